// The strip in nodes of schedules: of their widgets as they stand, or of the last run where an input decides.

import { ask, asker, settings } from "./ask.js";
import { extend } from "./extend.js";
import { refreshFiles, takeFiles } from "./files.js";
import { change } from "./graph.js";
import { addElement, Panel, widen } from "./panel.js";
import { recall, remember } from "./shown.js";

// Heights in pixels: a strip, a legend and a line; with what is known of a file or a run under them.
const HEIGHTS = {
  FlexiSchedule: 92,
  FlexiPreset: 142,
  FlexiLoadSchedule: 112,
  FlexiSaveSchedule: 112,
  FlexiTune: 142,
  FlexiTuneGuider: 142,
  FlexiLearn: 142,
  FlexiApply: 128,
};
const ASKED = ["FlexiSchedule", "FlexiPreset", "FlexiLoadSchedule"];
const WAITING = {
  FlexiApply: "The steps are shown here as they run.",
  FlexiLearn: "The first two pictures are recorded; what is learned from them is shown here.",
  FlexiSaveSchedule: "Where it is saved is shown here after a run.",
};
const WIDTH = 320; // pixels, of a new node

export const WITH_STRIP = Object.keys(HEIGHTS);

/** Return whether any widget's value comes over a link, so that only a run knows it. */
function isLinked(node) {
  return (node.inputs ?? []).some((input, i) => input.widget && node.isInputConnected(i));
}

/** Show what is known of a node now. */
function refresh(node) {
  const { panel, request } = node.flexi;
  if (ASKED.includes(node.comfyClass) && !isLinked(node)) request();
  else panel.show(recall(node) ?? { words: WAITING[node.comfyClass] ?? "The steps are shown here after the first run." });
}

/** Make a click on a step of a typed schedule its next kind. */
function makeEditable(node) {
  const { panel } = node.flexi;
  let last = Promise.resolve(); // clicks are answered one after another
  panel.element.classList.add("editable");
  panel.canvas.title = "Click on a step to change its kind";
  panel.canvas.addEventListener("pointerup", (event) => {
    const step = event.button === 0 && !isLinked(node) ? panel.stepAt(event) : null;
    if (step === null) return;
    last = last.then(async () => {
      const answer = await ask({ node: node.comfyClass, values: settings(node), step });
      if (answer.error) panel.warn(answer.error);
      else change(node, node.widgets.find((widget) => widget.name === "text"), answer.text);
    });
  });
}

export function addStrip(nodeType, nodeData) {
  extend(nodeType.prototype, "onNodeCreated", function () {
    const panel = new Panel();
    this.flexi = { panel, request: asker(this, (answer) => panel.show(answer)) };
    if (ASKED.includes(nodeData.name)) {
      for (const widget of this.widgets ?? []) extend(widget, "callback", () => refresh(this));
    }
    addElement(this, "flexi_strip", panel.element, HEIGHTS[nodeData.name]);
    widen(this, WIDTH);
    if (nodeData.name === "FlexiSchedule") makeEditable(this);
    if (["FlexiSchedule", "FlexiLoadSchedule"].includes(nodeData.name)) takeFiles(this);
    if (nodeData.name === "FlexiLoadSchedule") refreshFiles([this]);
    refresh(this);
  });
  extend(nodeType.prototype, "onConfigure", function () {
    refresh(this);
  });
  extend(nodeType.prototype, "onConnectionsChange", function () {
    if (this.flexi && ASKED.includes(nodeData.name)) refresh(this);
  });
  extend(nodeType.prototype, "onRemoved", function () {
    this.flexi?.panel.close();
  });
  extend(nodeType.prototype, "onExecuted", function (output) {
    const shown = output?.flexi_strip?.[0];
    if (!shown) return;
    remember(this, shown);
    if (!ASKED.includes(nodeData.name) || isLinked(this)) this.flexi.panel.show(shown);
    if (nodeData.name === "FlexiSaveSchedule") refreshFiles();
  });
}
