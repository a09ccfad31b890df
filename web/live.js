// A run as it goes on, in the node that put its schedule into the model: the server tells each step as it begins.

import { api } from "/scripts/api.js";
import { nodeOf } from "./graph.js";
import { remember } from "./shown.js";

export function listen() {
  api.addEventListener("flexiffusion.run", ({ detail }) => {
    const node = nodeOf(detail?.node);
    const panel = node?.flexi?.panel;
    if (!panel) return;
    const { done, node: _, ...shown } = detail;
    panel.show(shown, done);
    if (done === null) remember(node, shown);
  });
}
