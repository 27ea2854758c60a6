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

/** The differences of the colours of two pictures, of 255: the largest, and the mean. */
function compare(...files) {
  const [sizes, largest, mean] = JSON.parse(execFileSync(PYTHON, ["-c", `
import json, sys, numpy, PIL.Image
first, second = (numpy.asarray(PIL.Image.open(file).convert("RGB"), int) for file in sys.argv[1:])
print(json.dumps([[first.shape, second.shape], int(abs(first - second).max()), abs(first - second).mean()]))`, ...files]));
  assert.deepEqual(sizes[0], sizes[1]);
  return { largest, mean };
}

function assertSame(actual, desired) {
  const { largest } = compare(actual, desired);
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
  assertSame(file, at("desired.png"));
});

test("half the strength gives the picture of --style_strength 0.5", async () => {
  const strength = page.locator("#strength");
  await afterPainting(page, () => strength.fill("50")); // which changes it, too
  assertSame((await save(page)).file, at("half.png"));
  await afterPainting(page, () => strength.fill("100"));
});

test("a painting of one's own becomes a style, and transparency lies on white", async () => {
  await choosePhotograph(page, "transparent.png");
  await afterPainting(page, () => page.setInputFiles("#painting-file", at("painting.png")));
  const { name, file } = await save(page);
  assert.equal(name, "transparent-painting.png");
  assertSame(file, at("own.bmp"));
});

test("a photograph that lies on its side is turned upright", async () => {
  await choosePhotograph(page, "lying.jpg");
  await afterPainting(page, () => chooseStyle(page, "Starry night"));
  // Two decoders of JPEG differ by little, and the network by more.
  const { mean } = compare((await save(page)).file, at("upright.png"));
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
  // From here on: asked for only as the key is pressed, Chromium may have opened a dialog of its own already.
  page.on("filechooser", () => {});
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
    if (id === "style" || id === "strength") {
      await afterPainting(page, () => page.keyboard.press("ArrowLeft"));
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
  assert.equal(await page.textContent("#strength-shown"), "95 %");
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

test("opened as a file, the page says what it needs", async () => {
  const local = await context.newPage();
  await local.goto(`file://${at("page/index.html")}`);
  await says(local, "A browser runs this page only from a web server");
  await local.close();
});

// -------------------------------------------------------------------------------------------------- the camera

const shown = () => page.evaluate(() => at("canvas").toDataURL());

async function newFrame() {
  const before = await shown();
  await page.waitForFunction((before) => at("canvas").toDataURL() !== before, before);
}

/** What is shown of a camera that is held, once everything that is wanted is painted. */
async function settled() {
  for (const _ of ["a frame that was being painted", "what is held"]) {
    await page.evaluate(() => { frames.length = 0; live.refresh(); });
    await page.waitForFunction(() => frames.length > 0 && waiting.length === 0);
  }
  return shown();
}

/** How many tracks of cameras and microphones were opened, and how many are not released. */
const tracks = () => page.evaluate(() => ["video", "audio"].map((kind) => {
  const ofKind = opened.flatMap((stream) => stream.getTracks()).filter((track) => track.kind === kind);
  return [ofKind.length, ofKind.filter((track) => track.readyState === "live").length];
}));

test("the camera is painted live, in a style that may change; no frame waits", async () => {
  await page.evaluate(() => {
    Object.assign(window, { opened: [], frames: [] });
    const [open, plainAsk] = [navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices), ask];
    navigator.mediaDevices.getUserMedia = async (wishes) => opened[opened.push(await open(wishes)) - 1];
    window.ask = (task, more, moved) => {
      frames.push({ style: more.name, inTheQueue: waiting.length });
      return plainAsk(task, more, moved);
    };
  });
  await page.click("#camera");
  for (let frame = 0; frame < 3; frame++) await newFrame();
  await chooseStyle(page, "Starry night");
  await page.waitForFunction(() => frames.at(-1).style === "Starry night");
  await newFrame();
  await page.locator("#rate", { hasText: "frames a second, 455 × 256" }).waitFor();
  assert.equal(await page.evaluate(() => Math.max(...frames.map(({ inTheQueue }) => inTheQueue))), 0);
});

test("a frame that is held stays, is painted in another style, and saved", async () => {
  await page.click("#pause");
  const held = await settled();
  await page.waitForTimeout(1000);
  assert.equal(await shown(), held);
  await chooseStyle(page, "Jacamar");
  assert.notEqual(await settled(), held);
  await chooseStyle(page, "Starry night");
  assert.equal(await settled(), held);
  const { name, file } = await save(page);
  assert.equal(name, "camera-starry_night.png");
  const png = readFileSync(file);
  assert.deepEqual([png.toString("latin1", 1, 4), png.readUInt32BE(16), png.readUInt32BE(20)], ["PNG", 455, 256]);
  await page.click("#pause");
  await newFrame();
});

for (const hasSound of [false, true]) {
  test(`a clip is a film ${hasSound ? "with" : "without"} sound`, async () => {
    await page.locator("#sound").setChecked(hasSound);
    await page.click("#record");
    await says(page, "Recording the camera.");
    for (let frame = 0; frame < 2; frame++) await newFrame();
    const [download] = await Promise.all([page.waitForEvent("download"), page.click("#record")]);
    assert.equal(download.suggestedFilename(), "camera-starry_night.webm");
    const cinema = await context.newPage();
    const film = await cinema.evaluate(async (src) => {
      const video = Object.assign(document.createElement("video"), { src, muted: true });
      const ended = new Promise((resolve) => { video.onended = resolve; });
      await video.play();
      const sounds = video.captureStream().getAudioTracks().length;
      await ended;
      return [video.videoWidth, video.videoHeight, sounds, video.currentTime > 0];
    }, `data:video/webm;base64,${readFileSync(await download.path(), "base64")}`);
    await cinema.close();
    assert.deepEqual(film, [455, 256, Number(hasSound), true]);
    assert.deepEqual(await tracks(), [[1, 1], [Number(hasSound), 0]]);
  });
}

test("a telephone's screen is enough: the picture above, the controls below", async () => {
  await page.setViewportSize({ width: 390, height: 844 });
  const [width, [wall, ...buttons]] = await page.evaluate(() => [document.documentElement.scrollWidth,
    [at("wall"), ...document.querySelectorAll("#controls button:not(.still-only)")].map((each) => each.getBoundingClientRect().toJSON())]);
  assert.deepEqual([width, wall.top, buttons.length], [390, 0, 5]);
  for (const { top, bottom, height } of buttons) assert.ok(top > wall.bottom && bottom <= 844 && height >= 44);
  await afterPainting(page, () => page.click("#shoot"));
  assert.equal(await page.evaluate(() => document.documentElement.scrollWidth), 390);
  await page.setViewportSize({ width: 1280, height: 800 });
  assert.ok(await page.evaluate(() => document.documentElement.scrollHeight <= innerHeight));
});

test("the camera took a photograph, and can be stopped; a browser that cannot record says so", async () => {
  assert.match(await status(page), /^1920 × 1080 pixels/);
  assert.deepEqual((await tracks())[0], [1, 0]);
  await page.click("#camera");
  await newFrame();
  await page.evaluate(() => { delete window.MediaRecorder; });
  await page.click("#record");
  await says(page, "This browser cannot record clips (it has no MediaRecorder).");
  await newFrame();
  await page.click("#end");
  await says(page, "The camera is off.");
  assert.deepEqual((await tracks())[0], [2, 0]);
  assert.ok(await page.locator("#picture").isVisible());
});

for (const [name, message] of [["NotFoundError", "Requested device not found"], ["NotAllowedError", "Permission denied"]]) {
  test(`where the browser gives no camera (${name}) the page says why`, async () => {
    await page.evaluate((error) => {
      navigator.mediaDevices.getUserMedia = async () => { throw new DOMException(...error); };
    }, [message, name]);
    await page.click("#camera");
    await says(page, `The camera cannot be used (${message}).`);
    assert.ok(await page.locator("#status.error").isVisible());
  });
}

test("nothing was asked of any other place", () => {
  assert.ok(requests.length > 50);
  assert.deepEqual(requests.filter(({ address, url }) => !url.startsWith(address) && !/^(blob:|data:)/.test(url)), []);
});
