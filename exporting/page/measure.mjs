// How long a page takes to paint in headless Chromium on the processor: node exporting/page/measure.mjs FOLDER [SIDE] [TURNS]
// Prints the median time of the content graph for a picture of SIDE x SIDE pixels, one thread and several.

import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { launch, serve, WAIT } from "./test/chromium.mjs";

const [folder, side = 512, turns = 5] = process.argv.slice(2);
const profile = mkdtempSync(join(tmpdir(), "measure-"));
const context = await launch(profile);
const [agent] = context.pages();
console.log(await agent.evaluate(() => navigator.userAgent.match(/\w*Chrom\S+/)[0]), `${side} x ${side} pixels, median of ${turns}`);
for (const isIsolated of [false, true]) {
  const { address, stop } = await serve(folder, isIsolated);
  const page = await context.newPage();
  page.setDefaultTimeout(WAIT);
  await page.route("**/page.js", (route) => route.fulfill({ body: "", contentType: "text/javascript" })); // the painter alone
  await page.goto(address);
  const { means, times } = await page.evaluate(async ([side, turns]) => {
    const worker = new Worker("painter.js", { type: "module" });
    const ask = (task, more) => new Promise((resolve, reject) => {
      worker.onmessage = ({ data }) => (data.error ? reject(new Error(data.error)) : resolve(data.result));
      worker.postMessage({ number: 0, task, ...more });
    });
    const settings = await (await fetch("page.json")).json();
    const { means } = await ask("start", { settings, withoutGpu: true });
    const canvas = new OffscreenCanvas(side, side);
    const drawing = canvas.getContext("2d");
    drawing.drawImage(await createImageBitmap(await (await fetch("photograph.jpg")).blob()), 0, 0, side, side);
    await ask("photograph", { file: await canvas.convertToBlob() });
    const { mean, std } = settings.styles[0];
    const times = [];
    for (let turn = -1; turn < turns; turn++) { // the first is a warm-up
      const { milliseconds } = await ask("paint", { mean, std, strength: 1, width: side, height: side });
      if (turn >= 0) times.push(milliseconds);
    }
    return { means, times };
  }, [Number(side), Number(turns)]);
  times.sort((a, b) => a - b);
  console.log(`${means}: ${Math.round(times[Math.floor(times.length / 2)])} ms`);
  await page.close();
  stop();
}
await context.close();
rmSync(profile, { recursive: true, force: true });
