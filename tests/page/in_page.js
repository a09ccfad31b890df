// What tests do in the page, as `flexi`: graphs are made, nodes found, places told, as a person would see them.
"use strict";

window.flexi = {
  clear() {
    app.graph.clear();
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [0, 0];
    app.canvas.setDirty(true, true);
  },

  /** Make a node with values of its widgets; return its id. */
  add([type, x, y, values]) {
    const node = LiteGraph.createNode(type);
    node.pos = [x, y];
    app.graph.add(node);
    for (const [name, value] of Object.entries(values ?? {})) flexi.set([node.id, name, value]);
    return node.id;
  },

  connect([from, slot, to, name]) {
    const target = flexi.node(to);
    flexi.node(from).connect(
      slot,
      target,
      target.inputs.findIndex((input) => input.name === name),
    );
  },

  /** Make a graph that samples the demo model under what a node gives; return the ids of its nodes by name. */
  demo({ steps = 6, schedule = ["FlexiSchedule", { text: "3*(FX)" }], sampler = "euler" } = {}) {
    const { add, connect } = flexi;
    const seed = Math.floor(Math.random() * 2 ** 31); // another run than all before, whose results the server has
    const settings = { steps, cfg: 3, sampler_name: sampler, scheduler: "normal", seed, control_after_generate: "fixed" };
    const ids = {
      schedule: add([schedule[0], 200, 130, schedule[1]]),
      model: add(["FlexiDemoModel", 200, 460]),
      positive: add(["FlexiDemoPrompt", 200, 570]),
      negative: add(["FlexiDemoPrompt", 200, 840, { caption: "" }]),
      apply: add(["FlexiApply", 680, 130]),
      latent: add(["EmptyChromaRadianceLatentImage", 680, 500, { width: 32, height: 32 }]),
      sampler: add(["KSampler", 680, 680, settings]),
      report: add(["FlexiReport", 1020, 260]),
    };
    connect([ids.schedule, 0, ids.apply, "schedule"]);
    connect([ids.model, 0, ids.apply, "model"]);
    connect([ids.apply, 0, ids.sampler, "model"]);
    connect([ids.positive, 0, ids.sampler, "positive"]);
    connect([ids.negative, 0, ids.sampler, "negative"]);
    connect([ids.latent, 0, ids.sampler, "latent_image"]);
    connect([ids.apply, 1, ids.report, "run"]);
    connect([ids.sampler, 0, ids.report, "latent"]);
    return ids;
  },

  node: (id) => app.graph.getNodeById(id),
  widget: (id, name) => flexi.node(id).widgets.find((widget) => widget.name === name),

  /** Set a widget as its own control does. */
  set([id, name, value]) {
    const widget = flexi.widget(id, name);
    widget.value = value;
    widget.callback?.(value, app.canvas, flexi.node(id));
  },

  panel: (id) => flexi.node(id).flexi.panel,

  /** Return the box of something in a node [left, top, right, bottom], in pixels of the page; null where it is not seen. */
  box([id, selector]) {
    const own = flexi.node(id).widgets.find((widget) => widget.element?.matches?.(".flexi, .flexi-report"))?.element;
    const box = (selector ? own?.querySelector(selector) : own)?.getBoundingClientRect();
    return box?.width ? [box.left, box.top, box.right, box.bottom] : null;
  },

  strip: (id) => flexi.box([id, "canvas"]),

  /** Return a point in a node's title. */
  title(id) {
    const { left, top } = app.canvas.canvas.getBoundingClientRect();
    const [x, y] = flexi.node(id).pos;
    return [left + x + 60, top + y - 12];
  },

  /** Return a point in the field where a schedule's text is typed. */
  typing(id) {
    const vue = document.querySelector(`[data-node-id="${id}"] textarea`);
    const box = (vue ?? flexi.widget(id, "text").element).getBoundingClientRect();
    return [box.left + 60, box.bottom - 20];
  },

  /** Return the point in the middle of a step's cell. */
  cell([id, i, count]) {
    const [left, top, right, bottom] = flexi.strip(id);
    return [left + ((i + 0.5) * (right - left)) / count, (top + bottom) / 2];
  },

  /** Return the box of a whole node [left, top, right, bottom], its title with it, in the graph's own units. */
  outline(id) {
    const node = flexi.node(id);
    const seen = document.querySelector(`[data-node-id="${id}"]`)?.getBoundingClientRect();
    const [x, y] = node.pos;
    const title = LiteGraph.NODE_TITLE_HEIGHT;
    const height = seen ? seen.height : node.size[1] + title;
    return [x, y - title, x + (seen?.width ?? node.size[0]), y - title + height];
  },

  words: (id) => flexi.panel(id).words.innerText,
  report: (id) => flexi.node(id).widgets.find((widget) => widget.element?.matches?.(".flexi-report")).element.value,

  async idle() {
    const { queue_running: running, queue_pending: pending } = await (await fetch("/api/queue")).json();
    return running.length + pending.length === 0;
  },
};
