// What a run showed in a node. It comes back after an undo or in another tab from here, after a reload from the node itself.

const MOST_NODES = 500;
const MOST_KEPT = 8000; // characters in a saved graph
const known = new Map();

function key(node) {
  return `${node.graph?.id}:${node.id}`;
}

/** Keep what a run showed in a node: JSON, in the saved graph as well where it is not too long. */
export function remember(node, shown) {
  known.delete(key(node));
  known.set(key(node), shown);
  if (known.size > MOST_NODES) known.delete(known.keys().next().value);
  if (JSON.stringify(shown).length <= MOST_KEPT) node.properties.flexi_shown = shown;
}

/** Return what a run showed last in a node; undefined where nothing is known of it. */
export function recall(node) {
  return known.get(key(node)) ?? node.properties?.flexi_shown;
}
