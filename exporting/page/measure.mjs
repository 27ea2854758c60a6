// How fast a page paints in headless Chromium on the processor, by one thread and by several. Prints medians:
//   node exporting/page/measure.mjs FOLDER [SIDE] [TURNS]   milliseconds that a picture of SIDE x SIDE pixels takes
//   node exporting/page/measure.mjs FOLDER live [TURNS]     frames a second of the camera, which gives 30

import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { launch, serve, WAIT } from "./test/chromium.mjs";

const [folder, side = "512", turns = 5] = process.argv.slice(2);

async function milliseconds(page) {
  return page.evaluate(async (side) => {
    const canvas = new OffscreenCanvas(side, side);
    canvas.getContext("2d").drawImage(at("picture"), 0, 0, side, side);
    await ask("photograph", { file: await canvas.convertToBlob() });
    return (await ask("paint", { ...chosen(), width: side, height: side })).milliseconds;
  }, Number(side));
}

async function framesASecond(page) {
  await page.evaluate(() => { at("rate").textContent = ""; });
  return parseFloat(await (await page.waitForFunction(() => at("rate").textContent)).jsonValue());
}

const profile = mkdtempSync(join(tmpdir(), "measure-"));
const context = await launch(profile);
const [agent] = context.pages();
console.log(await agent.evaluate(() => navigator.userAgent.match(/\w*Chrom\S+/)[0]), `median of ${turns}`);
for (const isIsolated of [false, true]) {
  const { address, stop } = await serve(folder, isIsolated);
  const page = await context.newPage();
  page.setDefaultTimeout(WAIT);
  await page.goto(address);
  await page.locator("#status", { hasText: "painted in" }).waitFor();
  if (side === "live") await page.click("#camera");
  const values = [];
  for (let turn = -1; turn < turns; turn++) values.push(await (side === "live" ? framesASecond : milliseconds)(page));
  const median = values.slice(1).sort((a, b) => a - b)[Math.floor(turns / 2)]; // the first is a warm-up
  const unit = side === "live" ? await page.textContent("#rate") : `ms for ${side} x ${side} pixels`;
  console.log(await page.textContent("#means"), median.toFixed(1), unit.replace(/^[\d.]+ /, ""));
  await page.close();
  stop();
}
await context.close();
rmSync(profile, { recursive: true, force: true });
