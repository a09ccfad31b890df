// The page's graph: nodes by the ids of a run, and changes that undo takes back.

import { app } from "/scripts/app.js";

/** Return a node by its id in a run, which names the subgraphs on the way to it; undefined where it is not open here. */
export function nodeOf(id) {
  let graph = app.rootGraph ?? app.graph;
  const path = String(id).split(":");
  const last = path.pop();
  for (const step of path) graph = graph?.getNodeById(step)?.subgraph;
  return graph?.getNodeById(last) ?? graph?.getNodeById(Number(last)) ?? undefined;
}

/** Return the nodes of a class, those in subgraphs too. */
export function nodesOf(name) {
  const graphs = [app.rootGraph ?? app.graph];
  graphs.push(...(graphs[0].subgraphs?.values() ?? []));
  return graphs.flatMap((graph) => graph.nodes ?? graph._nodes ?? []).filter((node) => node.comfyClass === name);
}

/** Set a widget's value as a step that undo takes back. */
export function change(node, widget, value) {
  node.graph?.beforeChange?.();
  app.canvas?.emitBeforeChange?.();
  try {
    widget.value = value;
    widget.callback?.(value, app.canvas, node);
  } finally {
    app.canvas?.emitAfterChange?.();
    node.graph?.afterChange?.();
  }
}
