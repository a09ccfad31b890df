// Before and after in Flexi Compare: two pictures under a slider, and words.

import { api } from "/scripts/api.js";
import { extend } from "./extend.js";
import { addElement, addStyle, made, widen } from "./panel.js";
import { recall, remember } from "./shown.js";

const HEIGHT = 300; // pixels
const SIZE = [400, 460]; // pixels, of a new node
const WAITING = "All steps on the left, the schedule on the right: shown after a run.";

function address(image) {
  const { filename = "", subfolder = "", type = "temp" } = image ?? {};
  return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
}

/** Two pictures over one another, the upper one cut at the pointer. */
class Slider {
  constructor() {
    addStyle();
    this.element = made("div", "flexi");
    this.frame = made("div", "flexi-slider", this.element);
    this.schedule = made("img", "", this.frame);
    this.full = made("img", "flexi-full", this.frame);
    made("span", "flexi-left", this.frame).textContent = "all steps";
    made("span", "flexi-right", this.frame).textContent = "schedule";
    this.words = made("div", "flexi-words", this.element);
    for (const image of [this.schedule, this.full]) {
      image.draggable = false;
      image.onerror = () => (this.frame.style.visibility = "hidden"); // temporary files are gone after a restart
    }
    this.frame.addEventListener("pointermove", (event) => {
      const box = this.frame.getBoundingClientRect();
      this.cut((100 * (event.clientX - box.left)) / box.width);
    });
    this.show(undefined);
  }

  /** Show all steps left of a place, in percent, and the schedule right of it. */
  cut(place) {
    this.frame.style.setProperty("--flexi-cut", `${Math.min(Math.max(place, 0), 100)}%`);
  }

  show(said) {
    this.words.textContent = String(said?.words ?? WAITING).slice(0, 2000);
    this.frame.style.visibility = said?.full ? "visible" : "hidden";
    if (!said?.full) return;
    this.schedule.src = address(said.schedule);
    this.full.src = address(said.full);
    this.cut(50);
  }
}

export function addCompare(nodeType) {
  extend(nodeType.prototype, "onNodeCreated", function () {
    this.flexi = { slider: new Slider() };
    addElement(this, "flexi_compare", this.flexi.slider.element, HEIGHT);
    widen(this, ...SIZE);
  });
  extend(nodeType.prototype, "onConfigure", function () {
    this.flexi.slider.show(recall(this));
  });
  extend(nodeType.prototype, "onExecuted", function (output) {
    const shown = output?.flexi_compare?.[0];
    if (shown) {
      remember(this, shown);
      this.flexi.slider.show(shown);
      const widget = this.widgets.find((each) => each.name === "full_run");
      widget.value = false; // one full run is asked for at a time
      widget.callback?.(false);
    } else if (!recall(this)) {
      this.flexi.slider.show({ words: output?.text?.[0] });
    }
  });
}
