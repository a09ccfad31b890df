// The schedule strip in Flexi nodes, and the text of Flexi Report. The page works without it: nothing here may throw.

import { app } from "/scripts/app.js";

const COLOURS = { F: "#3d7ff0", P: "#35b597", N: "#565c69", X: "#f0a63c", f: "#9b7ff0", p: "#7ad0a0" };
const SHARES = { F: 1, P: 0.5, N: 0.08, X: 0.2, f: 0.5, p: 0.25 }; // height of a cell
const STRIP_HEIGHT = 26; // pixels
const LINE_HEIGHT = 14; // pixels, of the text under the strip
const CHARACTER_WIDTH = 5.2; // pixels, of it, on average
const MAX_STEPS = 2000; // drawn while typing
const MAX_TEXT = 100000; // characters of a schedule's text, as in Python
const MAX_LINES = 40; // under the strip
const MAX_LINE_TEXT = 2000; // characters under the strip
const MAX_REPORT = 200000; // characters
const WITH_STRIP = ["FlexiSchedule", "FlexiPreset", "FlexiLoadSchedule", "FlexiTune"];

/** Return the letters of a schedule text, "" when it is not one. The node's own parser decides; this only draws. */
function letters(text) {
  if (typeof text !== "string" || text.length > MAX_TEXT) return "";
  let rest = text.split(";")[0].replace(/\s+/g, "").replace(/@\d+(\^\d)?|~[-+.,\de]+/g, "");
  for (let nesting = 0; nesting < 9 && rest.includes("("); nesting++) {
    let made = 0;
    rest = rest.replace(/(\d{1,4})\*\(([FPNXfp|]*)\)/g, (_, count, inside) => {
      made += inside.length * count;
      return count < 1 || made > 8 * MAX_STEPS ? "?" : inside.repeat(Number(count));
    });
    if (rest.length > 8 * MAX_STEPS) return "";
  }
  rest = rest.replaceAll("|", "");
  return /^F[FPNXfp]*$/.test(rest) ? rest.slice(0, MAX_STEPS) : "";
}

function drawStrip(context, steps, width, top) {
  const left = 15;
  const pitch = (width - 2 * left) / Math.max(steps.length, 1);
  const gap = pitch > 4 ? 1 : 0;
  context.save();
  context.fillStyle = "rgba(128, 128, 128, 0.15)";
  context.fillRect(left, top, width - 2 * left, STRIP_HEIGHT);
  [...steps].forEach((kind, i) => {
    const height = STRIP_HEIGHT * SHARES[kind];
    context.fillStyle = COLOURS[kind];
    context.fillRect(left + i * pitch, top + STRIP_HEIGHT - height, Math.max(pitch - gap, 0.5), height);
  });
  context.restore();
}

/** Return a function that computes again only where its argument is another than the last time. */
function remembered(compute) {
  let known, result;
  return (...given) => {
    if (!known || given.some((value, i) => value !== known[i])) {
      result = compute(...given);
      known = given;
    }
    return result;
  };
}

/** Return the lines of a text in a node: parts are parted by line ends and semicolons, long ones broken between words. */
function lines(text, width) {
  const most = Math.max(Math.floor((width - 30) / CHARACTER_WIDTH), 10);
  const found = [];
  for (const part of text ? text.slice(0, MAX_LINE_TEXT).split(/\n|; /) : []) {
    if (found.length >= MAX_LINES) break;
    found.push("");
    for (const word of part.split(" ")) {
      const last = found[found.length - 1];
      if (last && last.length + 1 + word.length > most) found.push(word);
      else found[found.length - 1] = last ? `${last} ${word}` : word;
    }
  }
  return found.slice(0, MAX_LINES).map((line) => line.slice(0, 2 * most));
}

/** Draw text under the strip, a line for each of its parts, cut where the node ends. */
function drawLines(context, parts, width, top) {
  context.save();
  context.beginPath();
  context.rect(15, top, width - 30, LINE_HEIGHT * parts.length + 2);
  context.clip();
  context.fillStyle = "rgba(160, 160, 160, 1)";
  context.font = "10px sans-serif";
  context.textAlign = "left";
  context.textBaseline = "top";
  parts.forEach((part, i) => context.fillText(part, 15, top + 2 + i * LINE_HEIGHT));
  context.restore();
}

function settings(node) {
  return node.widgets?.filter((widget) => widget.type !== "flexi_strip").map((widget) => widget.value) ?? [];
}

function same(values, others) {
  return values.length === others?.length && values.every((value, i) => value === others[i]);
}

function addStrip(node) {
  // The page draws in every frame: texts are parsed and broken into lines when they or the width change.
  const lettersOf = remembered(letters);
  const linesOf = remembered(lines);
  const strip = {
    name: "flexi_strip",
    type: "flexi_strip",
    steps: "", // of the last execution
    line: "", // what a loaded file was made for, or what a preset will do
    settings: null, // the node's at that time; with others the steps are not known
    options: { serialize: false },
    serialize: false,
    computeSize(width) {
      return [width, STRIP_HEIGHT + 4 + LINE_HEIGHT * linesOf(this.line, width ?? node.size?.[0] ?? 300).length];
    },
    draw(context, _node, width, top) {
      const text = node.widgets?.find((widget) => widget.name === "text");
      const linked = node.inputs?.some((input) => input.name === "text" && input.link != null);
      const known = same(settings(node), this.settings);
      const executed = known ? this.steps : "";
      drawStrip(context, text && !linked ? lettersOf(text.value) : executed, width, top);
      if (known && this.line) drawLines(context, linesOf(this.line, width), width, top + STRIP_HEIGHT);
    },
  };
  node.addCustomWidget(strip);
  return strip;
}

function addText(node) {
  const element = document.createElement("textarea");
  element.readOnly = true;
  element.className = "comfy-multiline-input";
  element.placeholder = "The report appears here after sampling.";
  const options = { serialize: false, hideOnZoom: true, getMinHeight: () => 130, getMaxHeight: () => 400 };
  const widget = node.addDOMWidget("flexi_text", "flexi_text", element, options);
  widget.serialize = false;
  return element;
}

/** Call `after` behind a method of a node class, whatever the page or another pack has put there. */
function extend(nodeType, method, after) {
  const before = nodeType.prototype[method];
  nodeType.prototype[method] = function (...args) {
    const result = before?.apply(this, args);
    try {
      after.apply(this, args);
    } catch (error) {
      console.warn("Flexiffusion:", error);
    }
    return result;
  };
}

app.registerExtension({
  name: "Flexiffusion.Strip",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (WITH_STRIP.includes(nodeData?.name)) {
      extend(nodeType, "onNodeCreated", function () {
        this.flexiStrip = addStrip(this);
      });
      extend(nodeType, "onExecuted", function (output) {
        this.flexiStrip.steps = letters(output?.flexi_steps?.[0] ?? "");
        this.flexiStrip.line = String(output?.text?.[0] ?? "").slice(0, MAX_LINE_TEXT);
        this.flexiStrip.settings = settings(this);
        this.setDirtyCanvas?.(true, true);
      });
    } else if (nodeData?.name === "FlexiReport") {
      extend(nodeType, "onNodeCreated", function () {
        this.flexiText = addText(this);
      });
      extend(nodeType, "onExecuted", function (output) {
        this.flexiText.value = String(output?.text?.[0] ?? "").slice(0, MAX_REPORT);
      });
    }
  },
});
