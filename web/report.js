// The text of Flexi Report, which comes back after a reload.

import { extend } from "./extend.js";
import { addElement, widen } from "./panel.js";
import { recall, remember } from "./shown.js";

const MOST_SHOWN = 200000; // characters
const HEIGHT = 140; // pixels, at least
const SIZE = [460, 500]; // pixels, of a new node: there is room for the picture of the steps

export function addReport(nodeType) {
  extend(nodeType.prototype, "onNodeCreated", function () {
    const element = document.createElement("textarea");
    element.readOnly = true;
    element.className = "comfy-multiline-input flexi-report";
    element.placeholder = "The report appears here after sampling.";
    addElement(this, "flexi_text", element, HEIGHT);
    this.flexi = { show: (text) => (element.value = String(text ?? "").slice(0, MOST_SHOWN)) };
    widen(this, ...SIZE);
  });
  extend(nodeType.prototype, "onConfigure", function () {
    this.flexi.show(recall(this)?.text);
  });
  extend(nodeType.prototype, "onExecuted", function (output) {
    this.flexi.show(output?.text?.[0]);
    remember(this, { text: output?.text?.[0] });
  });
}
