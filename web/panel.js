// What a node shows of its schedule: a strip with a cell for each step, a legend, and words. Drawn when it changes, never by frame.

const STRIP = 26; // pixels
const MOST_STEPS = 2000;
let elements = 0; // so far
const MOST_TEXT = 4000; // characters
const STYLE = `
.flexi { display: flex; flex-direction: column; gap: 3px; box-sizing: border-box; width: 100%; overflow: hidden;
  font: 11px/15px Inter, Arial, sans-serif; color: var(--input-text, #ddd); padding: 2px 4px; }
.flexi canvas { width: 100%; height: ${STRIP}px; flex: none; display: block; border-radius: 3px;
  background: color-mix(in srgb, var(--input-text, #888) 15%, transparent); }
.flexi.editable canvas { cursor: pointer; }
.flexi-legend { display: flex; gap: 2px 10px; flex: none; height: 15px; overflow: hidden; opacity: 0.85; white-space: nowrap; }
.flexi-legend i { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 4px; }
.flexi-words { flex: none; max-height: 45px; min-height: 15px; overflow: hidden auto; user-select: text; }
.flexi-words.wrong { color: #e5484d; }
.flexi-details { flex: 1 1 0; min-height: 0; overflow: hidden auto; opacity: 0.85; user-select: text; white-space: pre-line; }
.flexi-slider { flex: 1 1 0; min-height: 0; position: relative; overflow: hidden; cursor: ew-resize; --flexi-cut: 50%; }
.flexi-slider img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; image-rendering: auto; user-select: none; }
.flexi-slider .flexi-full { clip-path: inset(0 calc(100% - var(--flexi-cut)) 0 0); }
.flexi-slider::after { content: ""; position: absolute; top: 0; bottom: 0; left: var(--flexi-cut); width: 2px; background: #fff; }
.flexi-slider span { position: absolute; bottom: 4px; padding: 1px 5px; border-radius: 3px; color: #fff; background: #0009; }
.flexi-left { left: 4px; }
.flexi-right { right: 4px; }
`;

/** Make an element in another one. */
export function made(tag, className, parent) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  parent?.append(element);
  return element;
}

/** Put the pack's own style into the page, once. */
export function addStyle() {
  if (document.getElementById("flexi-style")) return;
  const style = made("style", "", document.head);
  style.id = "flexi-style";
  style.textContent = STYLE;
}

/** A strip with its legend and words, as an element. */
export class Panel {
  constructor() {
    addStyle();
    this.element = made("div", "flexi");
    this.canvas = made("canvas", "", this.element);
    this.legend = made("div", "flexi-legend", this.element);
    this.words = made("div", "flexi-words", this.element);
    this.details = made("div", "flexi-details", this.element);
    this.shown = {};
    this.done = null; // steps that have run, while sampling
    this.watcher = new ResizeObserver(() => this.draw());
    this.watcher.observe(this.canvas);
  }

  /** Show what the server said: letters, kinds, words, details; or an error, beside the strip as it was.
   *  `done`: how many steps have run, while sampling. */
  show(said, done = null) {
    const wrong = typeof said.error === "string";
    if (!wrong) this.shown = { letters: String(said.letters ?? "").slice(0, MOST_STEPS), kinds: said.kinds ?? {} };
    this.done = done;
    this.write(wrong ? said.error : said.words, wrong ? "" : said.details, wrong);
    this.legend.replaceChildren(
      ...Object.values(this.shown.kinds ?? {}).map(({ colour, label }) => {
        const entry = made("span");
        made("i", "", entry).style.background = colour;
        entry.append(label);
        return entry;
      }),
    );
    this.canvas.style.opacity = wrong ? 0.35 : 1;
    this.draw();
  }

  /** Say why something is not done, beside the strip as it is. */
  warn(words) {
    this.write(words, "", true);
  }

  write(words, details, wrong) {
    this.words.classList.toggle("wrong", wrong);
    this.words.textContent = String(words ?? "").slice(0, MOST_TEXT);
    this.details.textContent = String(details ?? "").slice(0, MOST_TEXT);
    this.words.title = [this.words.textContent, this.details.textContent].filter(Boolean).join("\n");
  }

  draw() {
    const { canvas } = this;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width || !height) return;
    const scale = 2; // finer than the page's pixels, as the graph may be zoomed
    [canvas.width, canvas.height] = [width * scale, height * scale];
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    const { letters = "", kinds = {} } = this.shown;
    const pitch = width / Math.max(letters.length, 1);
    const gap = pitch > 4 ? 1 : 0;
    [...letters].forEach((letter, i) => {
      const { colour = "#888888", height: share = 0.2 } = kinds[letter] ?? {};
      context.globalAlpha = this.done === null || i < this.done ? 1 : 0.3;
      context.fillStyle = colour;
      context.fillRect(i * pitch, height * (1 - share), Math.max(pitch - gap, 0.5), height * share);
    });
    context.globalAlpha = 1;
    if (this.done !== null && letters) {
      context.fillStyle = "#e5484d";
      context.fillRect(Math.min(this.done * pitch, width - 2), 0, 2, height);
    }
  }

  /** Return which step is at a point of the page; null beside the strip, or where no step is known. */
  stepAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const at = Math.floor(((event.clientX - box.left) / box.width) * (this.shown.letters?.length ?? 0));
    return at >= 0 && at < (this.shown.letters?.length ?? 0) ? at : null;
  }

  close() {
    this.watcher.disconnect();
  }
}

/** Put an element into a node as a widget of a height, in pixels, that is not saved. */
export function addElement(node, name, element, height) {
  const options = {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => height,
    getValue: () => "",
    setValue: () => {},
  };
  element.style.minHeight = `${height}px`;
  // A type of its own for each: Nodes 2.0 keeps the element of a node that it takes for the same, as after an undo.
  const widget = node.addDOMWidget(name, `${name} ${++elements}`, element, options);
  widget.serialize = false;
  return widget;
}

/** Make a new node at least so wide and high, and high enough for what is in it, in pixels. */
export function widen(node, width, height = 0) {
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], node.computeSize()[1], height)]);
}
