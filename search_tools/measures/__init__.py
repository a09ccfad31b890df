"""How near pictures are, in figures; and the judging of what was found."""
