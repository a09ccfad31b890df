// What the pack adds to its nodes in the page. The page works without it: nothing here may throw.

import { app } from "/scripts/app.js";
import { addCompare } from "./compare.js";
import { listen } from "./live.js";
import { addReport } from "./report.js";
import { addStrip, WITH_STRIP } from "./strip.js";

app.registerExtension({
  name: "Flexiffusion",
  setup: listen,
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (WITH_STRIP.includes(nodeData?.name)) addStrip(nodeType, nodeData);
    else if (nodeData?.name === "FlexiReport") addReport(nodeType);
    else if (nodeData?.name === "FlexiCompare") addCompare(nodeType);
  },
});
