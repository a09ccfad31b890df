// What the pack's server says of a node's settings. All parsing is there; a question is asked when something changes.

import { api } from "/scripts/api.js";

const WAIT = 150; // milliseconds after the last change
const MOST = 150000; // characters of a value; the server reads no more

/** Return the server's answer to a question: what a node shows, or {error}. */
export async function ask(question) {
  try {
    const answer = await api.fetchApi("/flexiffusion/strip", { method: "POST", body: JSON.stringify(question) });
    if (answer.status === 404) return { error: "The server does not know this page's questions: restart ComfyUI." };
    return await answer.json();
  } catch (error) {
    return { error: `The server does not answer (${error.message}).` };
  }
}

/** Return the values of a node's own widgets, by name. */
export function settings(node) {
  const own = (node.widgets ?? []).filter((widget) => widget.options?.serialize !== false);
  return Object.fromEntries(own.map((widget) => [widget.name, bounded(widget.value)]));
}

function bounded(value) {
  return typeof value === "string" ? value.slice(0, MOST) : value;
}

/** Return a function that asks about a node a little after its last call, and hands on the answer to the newest question. */
export function asker(node, hear) {
  let timer, newest;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(async () => {
      const question = { node: node.comfyClass, values: settings(node) };
      const key = JSON.stringify(question);
      if (key === newest) return;
      newest = key;
      const answer = await ask(question);
      if (key === newest) hear(answer);
      if (answer.error) newest = undefined; // asked again at the next change, whatever it was
    }, WAIT);
  };
}
