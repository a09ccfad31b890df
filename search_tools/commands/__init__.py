"""The commands of `flexi`, one module each; each imports what it computes with when it is called."""
