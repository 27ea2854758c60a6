// The page in headless Chromium, beside `--mode test`: `make test-browser`.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { HERE, PYTHON, WAIT, launch, serve } from "./chromium.mjs";

const TOLERANCE = 3; // of 255

const folder = mkdtempSync(join(tmpdir(), "page-"));
const at = (name) => join(folder, name);
const requests = [];
let context, server, page;

// ------------------------------------------------------------------------------------------------ tools

/** A new page, once it has painted its own photograph. */
async function open(address, prepare = async () => {}) {
  const page = await context.newPage();
  page.setDefaultTimeout(WAIT);
  page.on("request", (request) => requests.push({ address, url: request.url() }));
  page.on("pageerror", (error) => assert.fail(`the page raised ${error}`));
  await prepare(page);
  await page.goto(address);
  await painted(page);
  return page;
}

const status = (page) => page.locator("#status").textContent();
const says = (page, pattern) => page.locator("#status", { hasText: pattern }).waitFor();
const painted = (page) => says(page, /pixels, painted in/);

/** Waits until what `act` asks for is painted. */
async function afterPainting(page, act) {
  await page.evaluate(() => { document.querySelector("#status").textContent = ""; });
  await act();
  await painted(page);
}

const choosePhotograph = (page, name) => afterPainting(page, () => page.setInputFiles("#photograph-file", at(name)));
const chooseStyle = (page, name) => page.getByLabel(name, { exact: true }).check({ force: true });

async function save(page) {
  const [download] = await Promise.all([page.waitForEvent("download"), page.click("#save")]);
  return { name: download.suggestedFilename(), file: await download.path() };
}

/** Sizes of two PNG files, and the differences of their colours: the largest, and the mean. */
async function compare(actual, desired) {
  const [sizes, largest, mean] = await page.evaluate(async (files) => {
    const pixels = await Promise.all(files.map(async (text) => {
      const bitmap = await createImageBitmap(new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))]));
      const canvas = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
      canvas.drawImage(bitmap, 0, 0);
      return canvas.getImageData(0, 0, bitmap.width, bitmap.height);
    }));
    const [first, second] = pixels.map(({ data }) => data);
    const differences = Array.from(first, (value, place) => Math.abs(value - second[place]));
    const sum = differences.reduce((total, value) => total + value, 0);
    return [pixels.map(({ width, height }) => `${width} x ${height}`), differences.reduce((a, b) => Math.max(a, b)), sum / differences.length];
  }, [actual, desired].map((file) => readFileSync(file, "base64")));
  assert.equal(sizes[0], sizes[1]);
  return { largest, mean };
}

async function assertSame(actual, desired) {
  const { largest } = await compare(actual, desired);
  assert.ok(largest <= TOLERANCE, `differs from --mode test by ${largest} of 255`);
}

before(async () => {
  execFileSync(PYTHON, [join(HERE, "prepare.py"), folder], { stdio: ["ignore", "ignore", "inherit"] });
  context = await launch(at("profile"));
  server = await serve(at("page"));
  page = await open(server.address);
});

after(async () => {
  await context?.close();
  server?.stop();
  rmSync(folder, { recursive: true, force: true });
});

// ------------------------------------------------------------------------------------------ what is painted

test("a bundled style gives the picture of --mode test", async () => {
  await choosePhotograph(page, "photo.png");
  await afterPainting(page, () => chooseStyle(page, "Starry night"));
  const { name, file } = await save(page);
  assert.equal(name, "photo-starry_night.png");
  await assertSame(file, at("desired.png"));
});

test("half the strength gives the picture of --style_strength 0.5", async () => {
  const strength = page.locator("#strength");
  await afterPainting(page, async () => {
    await strength.fill("50");
    await strength.dispatchEvent("change");
  });
  await assertSame((await save(page)).file, at("half.png"));
  await strength.fill("100");
});

test("a painting of one's own becomes a style, and transparency lies on white", async () => {
  await choosePhotograph(page, "transparent.png");
  await afterPainting(page, () => page.setInputFiles("#painting-file", at("painting.png")));
  const { name, file } = await save(page);
  assert.equal(name, "transparent-painting.png");
  await assertSame(file, at("own.bmp"));
});

test("a photograph that lies on its side is turned upright", async () => {
  await choosePhotograph(page, "lying.jpg");
  await afterPainting(page, () => chooseStyle(page, "Starry night"));
  // Two decoders of JPEG differ by little, and the network by more.
  const { mean } = await compare((await save(page)).file, at("upright.png"));
  assert.ok(mean < TOLERANCE, `differs from --mode test by ${mean} of 255 on average`);
});

test("a large photograph is reduced, and the page says so", async () => {
  const limited = await open(server.address, (page) => page.route("**/page.json", async (route) => {
    const response = await route.fetch();
    await route.fulfill({ response, json: { ...(await response.json()), maxPixels: 10_000 } });
  }));
  await choosePhotograph(limited, "photo.png");
  assert.match(await limited.textContent("#limit"), /203 × 151 reduced to at most 0.0 megapixels/);
  assert.match(await status(limited), /^115 × 86 pixels, painted/);
  await limited.close();
});

test("several threads paint where the server allows them", async () => {
  const { address, stop } = await serve(at("page"), true);
  const isolated = await open(address);
  const cores = await isolated.evaluate(() => [crossOriginIsolated, navigator.hardwareConcurrency]);
  const means = await isolated.textContent("#means");
  assert.match(means, cores[1] > 1 ? new RegExp(`on ${Math.min(cores[1], 8)} threads`) : /on one thread/);
  assert.ok(cores[0]);
  assert.match(await page.textContent("#means"), /on one thread of the processor/);
  await isolated.close();
  stop();
});

// ------------------------------------------------------------------------------------------------ the page

for (const name of ["text.jpg", "cut.png", "cut.jpg"]) {
  test(`of a broken file (${name}) the page says so, and goes on`, async () => {
    await page.setInputFiles("#photograph-file", at(name));
    await says(page, `${name[0].toUpperCase()}${name.slice(1)} cannot be read as a picture.`);
    assert.ok(await page.locator("#status.error").isVisible());
    await choosePhotograph(page, "small.png");
    assert.equal(await page.locator("#status.error").count(), 0);
  });
}

test("every control is reached by Tab, has a name, and works by keys", async () => {
  await choosePhotograph(page, "small.png");
  await page.locator("body").click({ position: { x: 5, y: 5 } });
  const reached = [];
  for (let presses = 0; presses < 20; presses++) {
    await page.keyboard.press("Tab");
    const [id, hasName, isSeen] = await page.evaluate(() => {
      const { activeElement: element } = document;
      const seen = element.closest("label") ?? element;
      return [element.id || element.name, Boolean(element.labels?.length || element.textContent.trim()),
        [seen, ...seen.querySelectorAll("img")].some((each) => getComputedStyle(each).outlineStyle !== "none")];
    });
    if (!id || reached.includes(id)) break;
    reached.push(id);
    assert.ok(hasName, `${id} has no name`);
    assert.ok(isSeen, `${id} shows no focus`);
    if (id === "style") {
      await afterPainting(page, () => page.keyboard.press("ArrowLeft"));
    } else if (id === "strength") {
      await afterPainting(page, () => page.keyboard.press("ArrowLeft"));
      assert.equal(await page.textContent("#strength-shown"), "95 %");
    } else if (id === "compare") {
      await page.keyboard.press("Space");
      assert.equal(await page.getAttribute("#compare", "aria-pressed"), "true");
      await page.keyboard.press("Space");
    } else if (id === "save") {
      await Promise.all([page.waitForEvent("download"), page.keyboard.press("Enter")]);
    } else if (id === "photograph-file") {
      await Promise.all([page.waitForEvent("filechooser"), page.keyboard.press("Enter")]);
    }
  }
  assert.deepEqual(reached, ["photograph-file", "camera", "style", "painting-file", "strength", "save", "compare", "sources"]);
});

test("painting can be stopped, and goes on when asked again", async () => {
  await page.setInputFiles("#photograph-file", at("large.png"));
  await page.click("#stop");
  await says(page, "Stopped.");
  assert.ok(await page.locator("#save").isDisabled());
  await afterPainting(page, () => page.locator("#size").selectOption("512 × 384"));
  await afterPainting(page, () => chooseStyle(page, "Jacamar"));
  assert.equal((await save(page)).name, "large-jacamar.png");
});

test("the camera takes a photograph", async () => {
  await page.click("#camera");
  await page.waitForFunction(() => document.querySelector("video").videoWidth > 0);
  await page.click("#shoot");
  await page.locator('#picture[alt="The photograph camera"]').waitFor();
  assert.equal(await page.evaluate(() => document.querySelector("video").srcObject), null);
});

test("a telephone's width is enough", async () => {
  await page.setViewportSize({ width: 375, height: 700 });
  assert.equal(await page.evaluate(() => document.documentElement.scrollWidth), 375);
  await page.setViewportSize({ width: 1280, height: 800 });
  assert.ok(await page.evaluate(() => document.documentElement.scrollHeight <= innerHeight));
});

test("opened as a file, the page says what it needs", async () => {
  const local = await context.newPage();
  await local.goto(`file://${at("page/index.html")}`);
  await says(local, "A browser runs this page only from a web server");
  await local.close();
});

test("nothing was asked of any other place", () => {
  assert.ok(requests.length > 50);
  assert.deepEqual(requests.filter(({ address, url }) => !url.startsWith(address) && !/^(blob:|data:)/.test(url)), []);
});
