// The buttons of Flexi Learn: keep what was learned in the workflow, or forget it. The page works without it.

import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";

const MAX_FROZEN = 100000; // characters

/** Return what the server answers about a node's learning; null where it does not. */
async function ask(path, options) {
  try {
    const answer = await api.fetchApi(`/flexiffusion/${path}`, options);
    return answer.ok ? await answer.json() : null;
  } catch (error) {
    console.warn("Flexiffusion:", error);
    return null;
  }
}

function say(summary, detail) {
  app.extensionManager?.toast?.add({ severity: "info", summary, detail, life: 5000 });
}

async function freeze(node) {
  const known = await ask(`learned/${encodeURIComponent(node.id)}`);
  const schedules = known?.schedules ?? [];
  if (!schedules.length) {
    say("Nothing to freeze yet", "Sample until the node says what it computes.");
    return;
  }
  const widget = node.widgets?.find(({ name }) => name === "frozen");
  widget.value = schedules.join("\n").slice(0, MAX_FROZEN);
  widget.callback?.(widget.value);
  node.setDirtyCanvas?.(true, true);
  say("Frozen", "The workflow now holds what was learned. Empty the field to learn again.");
}

async function forget(node) {
  const answer = await ask(`forget/${encodeURIComponent(node.id)}`, { method: "POST" });
  const widget = node.widgets?.find(({ name }) => name === "frozen");
  widget.value = "";
  widget.callback?.("");
  node.setDirtyCanvas?.(true, true);
  say("Forgotten", `${answer?.forgotten ?? 0} kinds of runs. The next full runs are recorded.`);
}

app.registerExtension({
  name: "Flexiffusion.Learn",
  nodeCreated(node) {
    if (node.comfyClass !== "FlexiLearn") return;
    for (const [label, action] of [["Freeze", freeze], ["Forget", forget]]) {
      const button = node.addWidget("button", label, null, () => action(node), { serialize: false });
      button.serialize = false;
    }
  },
});
