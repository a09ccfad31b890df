// Opens the page of a running ComfyUI and writes what it exports of saved workflows, a JSON line for each:
// {"name", "output"} or {"name", "error"}.
//
//   node export.cjs PLAYWRIGHT_CORE CHROMIUM URL WORKFLOW.json...
"use strict";

const fs = require("fs");
const path = require("path");

const [core, chromium, url, ...files] = process.argv.slice(2);
const READY_MS = 120_000;
const EXPORT_MS = 60_000;

/** Return the page, loaded and ready to take workflows. */
async function open(browser) {
  const page = await browser.newPage();
  await page.goto(url);
  await page.waitForFunction(() => window.app?.graph && window.app.extensionManager && !window.app.extensionManager.spinner, null, {
    timeout: READY_MS,
  });
  await page.waitForTimeout(4000); // its extensions set themselves up and load the workflow that it starts with
  return page;
}

/** Return the API form that the page makes of a saved workflow. */
function exported(page, saved) {
  const made = page.evaluate(async (data) => {
    await window.app.loadGraphData(data, true, false, null, { skipAssetScans: true });
    return (await window.app.graphToPrompt()).output;
  }, saved);
  let timer;
  const late = new Promise((_, fail) => {
    timer = setTimeout(() => fail(new Error(`no answer after ${EXPORT_MS / 1000} s`)), EXPORT_MS);
  });
  return Promise.race([made, late]).finally(() => clearTimeout(timer));
}

async function main() {
  const browser = await require(core).chromium.launch({
    executablePath: chromium,
    args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
  });
  let page = await open(browser);
  for (const file of files) {
    const name = path.basename(file);
    const saved = JSON.parse(fs.readFileSync(file, "utf8"));
    let said;
    for (let tries = 0; tries < 2; tries++) {
      try {
        said = { name, output: await exported(page, saved) };
        break;
      } catch (error) {
        said = { name, error: String(error.message).split("\n")[0] };
        await page.close();
        page = await open(browser); // what one workflow left behind is no matter of the next
      }
    }
    process.stdout.write(JSON.stringify(said) + "\n");
  }
  await browser.close();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
