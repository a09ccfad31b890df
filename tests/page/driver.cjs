// Drives the page in a headless Chromium: commands as JSON lines in, answers as JSON lines out.
//
//   node driver.cjs PLAYWRIGHT_CORE CHROMIUM
//
// A command is {"view", "do", "args"}: `view` names a page, which `open` makes. An answer is {"value"} or {"error"}.
"use strict";

const readline = require("readline");

const [core, chromium] = process.argv.slice(2);
const READY_MS = 120_000;
const SIZE = { width: 1500, height: 1000 };
const pages = new Map();

/** Wait until the page takes workflows. */
async function ready(page) {
  const loaded = () => window.app?.graph && window.app.extensionManager && !window.app.extensionManager.spinner;
  await page.waitForFunction(loaded, null, { timeout: READY_MS });
  await page.waitForTimeout(1500); // its extensions set themselves up and load the workflow that it starts with
}

/** Put files into a drag, and let them fall on a point of the page. */
function drop([x, y, files]) {
  const data = new DataTransfer();
  for (const { name, type, base64 } of files) {
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    data.items.add(new File([bytes], name, { type }));
  }
  const place = { clientX: x, clientY: y, bubbles: true, cancelable: true, composed: true };
  const target = document.elementFromPoint(x, y);
  for (const kind of ["dragenter", "dragover", "drop"]) target.dispatchEvent(new DragEvent(kind, { ...place, dataTransfer: data }));
}

/** Set the page's settings, which the server keeps for all views. */
const set = (page, url, settings) => page.request.post(`${url}/api/settings`, { data: settings });

const COMMANDS = {
  async open(browser, view, url, settings) {
    const context = await browser.newContext({ viewport: SIZE });
    const page = await context.newPage();
    const said = [];
    page.on("console", (message) => said.push(`${message.type()}: ${message.text()}`));
    page.on("pageerror", (error) => said.push(`pageerror: ${error.message}`));
    pages.set(view, { page, said });
    await set(page, url, settings);
    await page.goto(url);
    await ready(page);
  },
  async reload(browser, view, settings) {
    const { page } = pages.get(view);
    await set(page, new URL(page.url()).origin, settings);
    await page.reload();
    await ready(page);
  },
  evaluate: (browser, view, source, arg) =>
    pages.get(view).page.evaluate(([text, value]) => (0, eval)(`(${text})`)(value), [source, arg]),
  click: (browser, view, x, y) => pages.get(view).page.mouse.click(x, y),
  move: (browser, view, x, y) => pages.get(view).page.mouse.move(x, y, { steps: 4 }),
  drag: async (browser, view, [x, y], [toX, toY]) => {
    const { mouse } = pages.get(view).page;
    await mouse.move(x, y);
    await mouse.down();
    await mouse.move(toX, toY, { steps: 4 });
    await mouse.up();
  },
  press: (browser, view, key) => pages.get(view).page.keyboard.press(key),
  type: (browser, view, text) => pages.get(view).page.keyboard.type(text),
  drop: (browser, view, x, y, files) => pages.get(view).page.evaluate(drop, [x, y, files]),
  said: (browser, view) => pages.get(view).said.splice(0),
  screenshot: async (browser, view) => (await pages.get(view).page.screenshot()).toString("base64"),
};

async function main() {
  const browser = await require(core).chromium.launch({
    executablePath: chromium,
    args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
  });
  for await (const line of readline.createInterface({ input: process.stdin })) {
    let answer;
    try {
      const { view, do: name, args } = JSON.parse(line);
      answer = { value: (await COMMANDS[name](browser, view, ...args)) ?? null };
    } catch (error) {
      answer = { error: String(error.message ?? error) };
    }
    process.stdout.write(JSON.stringify(answer) + "\n");
  }
  await browser.close();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
