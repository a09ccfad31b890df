// Schedule files: the list in Flexi Load Schedule, and files that are dropped on a node.

import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";
import { ask } from "./ask.js";
import { change, nodesOf } from "./graph.js";

const MOST_BYTES = 4 * 1024 * 1024; // as in Python
const MARK = "flexiffusion-schedule";

/** Give nodes that load a schedule the files that there are now. */
export async function refreshFiles(nodes = nodesOf("FlexiLoadSchedule")) {
  try {
    const names = await (await api.fetchApi("/flexiffusion/files")).json();
    for (const node of nodes) {
      const widget = node.widgets?.find((each) => each.name === "file");
      if (widget) widget.options.values = names;
    }
  } catch (error) {
    console.warn("Flexiffusion: the list of schedule files could not be read:", error);
  }
}

function schedulesIn(event) {
  const files = [...(event.dataTransfer?.files ?? [])];
  return files.filter((file) => file.name.toLowerCase().endsWith(".json") && file.size <= MOST_BYTES);
}

/** Let a schedule's file fall on a node: typed there, or kept among the user's files and chosen. */
export function takeFiles(node) {
  node.onDragOver = (event) => [...(event.dataTransfer?.items ?? [])].some((item) => item.kind === "file");
  node.onDragDrop = (event) => take(node, schedulesIn(event)[0]);
  // The strip lies over the canvas, which does not see what is over it.
  const { element } = node.flexi.panel;
  element.addEventListener("dragover", (event) => event.preventDefault());
  element.addEventListener("drop", async (event) => {
    const [file] = schedulesIn(event);
    if (!file) return; // a picture: the page's own
    event.preventDefault();
    event.stopPropagation();
    if (!(await take(node, file))) app.handleFile?.(file);
  });
}

/** Give a node the schedule in a file; return whether there is one. */
async function take(node, file) {
  const content = await file?.text();
  if (!content?.includes(MARK)) return false; // a workflow: the page's own
  const typed = node.comfyClass === "FlexiSchedule";
  const answer = await ask({ node: node.comfyClass, values: {}, file: content, name: file.name });
  if (answer.error) {
    node.flexi.panel.show(answer);
  } else if (typed) {
    change(node, node.widgets.find((widget) => widget.name === "text"), answer.text);
  } else {
    await refreshFiles();
    change(node, node.widgets.find((widget) => widget.name === "file"), answer.file);
  }
  return true;
}
