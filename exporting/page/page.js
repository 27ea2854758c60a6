// The page: what is chosen, and what is shown. The work itself is done by painter.js, beside the page.
"use strict";

const at = (id) => document.getElementById(id);

let settings; // page.json: the styles, and the largest number of pixels
let styles = []; // { name, mean, std }: the bundled ones, then the visitor's own
let photograph; // { file, name, url, own, sizes }
let painted; // { url, name, width, height } of the picture that "save" saves
let wanted = false; // whether something has changed since the last painting began
let rate; // milliseconds that a pixel took last time

// ----------------------------------------------------------------------------------------------- the painter

let worker, ready, usesGpu;
let gpuFailure = ""; // why the GPU is left alone
let asked = 0;
const waiting = new Map();

class Stopped extends Error {}

/** Begins anew, with an empty memory; what was asked of the last painter ends with `Stopped`. */
function hirePainter() {
  worker?.terminate();
  for (const { reject } of waiting.values()) reject(new Stopped());
  waiting.clear();
  worker = new Worker("painter.js", { type: "module" });
  worker.onmessage = ({ data: { number, result, error } }) => {
    const { resolve, reject } = waiting.get(number);
    waiting.delete(number);
    if (error === undefined) resolve(result);
    else reject(new Error(error));
  };
  worker.onerror = (event) => {
    event.preventDefault();
    for (const { reject } of waiting.values()) reject(new Error(event.message || "a file of the page is missing"));
    waiting.clear();
  };
  ready = ask("start", { settings, withoutGpu: gpuFailure !== "" }).then(async ({ means, warning }) => {
    usesGpu = means === "the GPU";
    at("means").textContent = `Painted by ${settings.network} on ${means}.`;
    if (photograph) await ask("photograph", { file: photograph.file });
    return warning;
  });
  ready.catch(() => {}); // whoever waits for it hears of it
}

function ask(task, more = {}) {
  return new Promise((resolve, reject) => {
    waiting.set(++asked, { resolve, reject });
    worker.postMessage({ number: asked, task, ...more });
  });
}

// ----------------------------------------------------------------------------------------- what is being done

function say(text, isError = false) {
  at("status").textContent = text;
  at("status").classList.toggle("error", isError);
}

function sayError(error) {
  if (!(error instanceof Stopped)) say(error.message.replace(/^./, (first) => first.toUpperCase()).replace(/\.?$/, "."), true);
}

/** Shows that work goes on while `work` does; as a share of the time where `milliseconds` are expected. */
async function showing(work, milliseconds) {
  const bar = at("progress");
  showing.count = (showing.count ?? 0) + 1;
  bar.hidden = false;
  bar.removeAttribute("value");
  const begun = performance.now();
  const timer = milliseconds && setInterval(() => {
    bar.value = Math.min(0.98, (performance.now() - begun) / milliseconds);
  }, 100);
  try {
    return await work;
  } finally {
    clearInterval(timer);
    bar.hidden = --showing.count === 0;
  }
}

/** Paints what is chosen now; while that takes, only the newest choice waits. */
async function paint() {
  if (!photograph) return;
  wanted = true;
  if (paint.isBusy) return;
  paint.isBusy = true;
  try {
    while (wanted) {
      wanted = false;
      await paintOnce();
    }
  } finally {
    paint.isBusy = false;
  }
}

async function paintOnce() {
  const { mean, std, name } = styles[document.querySelector("[name=style]:checked").value];
  const strength = at("strength").value / 100;
  const subject = photograph;
  const { width, height } = subject.sizes[at("size").value];
  say(`Painting ${width} × ${height} pixels …`);
  at("stop").hidden = false;
  try {
    const warning = await showing(ready);
    const work = ask("paint", { mean, std, strength, width, height });
    const { file, milliseconds } = await showing(work, rate && rate * width * height);
    rate = milliseconds / (width * height);
    if (photograph !== subject) return;
    showPainted({ file, width, height, name: `${subject.name}-${name.toLowerCase().replaceAll(" ", "_")}` });
    say(`${width} × ${height} pixels, painted in ${(milliseconds / 1000).toFixed(1)} s. ${gpuFailure || warning}`);
  } catch (error) {
    if (error instanceof Stopped) say("Stopped.");
    else recover(error, width, height);
  } finally {
    at("stop").hidden = true;
  }
}

/** After a failure, which may have left the memory full: a new painter; where the GPU failed, without it. */
function recover({ message }, width, height) {
  if (usesGpu) {
    gpuFailure = `The GPU could not paint ${width} × ${height} pixels (${message}), so the processor did.`;
    wanted = true;
  }
  hirePainter();
  sayError(new Error(`painting ${width} × ${height} pixels failed (${message}); a smaller size takes less memory`));
}

function stop() {
  wanted = false;
  hirePainter();
}

function showPainted({ file, width, height, name }) {
  if (painted) URL.revokeObjectURL(painted.url);
  painted = { url: URL.createObjectURL(file), name, width, height };
  at("save").disabled = at("compare").disabled = false;
  compare(false);
}

/** Shows the photograph, or what was painted of it. */
function compare(showsPhotograph) {
  at("compare").setAttribute("aria-pressed", showsPhotograph);
  at("picture").src = showsPhotograph ? photograph.url : painted.url;
  at("picture").alt = showsPhotograph ? `The photograph ${photograph.name}` : `The painted picture ${painted.name}`;
  at("picture").hidden = false;
}

function save() {
  const link = document.createElement("a");
  link.href = painted.url;
  link.download = `${painted.name}.png`;
  link.click();
  say(`Saved ${link.download}, ${painted.width} × ${painted.height} pixels.`);
}

// --------------------------------------------------------------------------------------------- what is chosen

const stem = (name) => name.replace(/\.[^.]*$/, "");

async function choosePhotograph(file) {
  if (!file) return;
  try {
    say(`Opening ${file.name} …`);
    await showing(ready);
    const { own, sizes } = await showing(ask("photograph", { file }));
    if (photograph) URL.revokeObjectURL(photograph.url);
    photograph = { file, name: stem(file.name), url: URL.createObjectURL(file), own, sizes };
    offerSizes();
    if (painted) URL.revokeObjectURL(painted.url);
    painted = undefined;
    at("save").disabled = at("compare").disabled = true;
    compare(true);
    paint();
  } catch (error) {
    sayError(error);
  }
}

function offerSizes() {
  const { own, sizes } = photograph;
  at("size").replaceChildren(...sizes.map(({ width, height }, number) => new Option(`${width} × ${height}`, number)));
  at("size").disabled = sizes.length === 1;
  const most = `${(settings.maxPixels / 1e6).toFixed(1)} megapixels`;
  at("limit").textContent = sizes[0].width === own.width ? `at most ${most}`
    : `${own.width} × ${own.height} reduced to at most ${most}`;
}

async function choosePainting(file) {
  if (!file) return;
  try {
    say(`Looking at ${file.name} …`);
    await showing(ready);
    const style = await showing(ask("painting", { file }));
    addStyle({ name: stem(file.name), ...style }, URL.createObjectURL(file)).checked = true;
    await paint();
    if (style.isReduced) say(`${at("status").textContent} The painting was looked at in ${style.width} × ${style.height} pixels.`);
  } catch (error) {
    sayError(error);
  }
}

function addStyle(style, thumbnail) {
  const input = Object.assign(document.createElement("input"), { type: "radio", name: "style", value: styles.length });
  const image = Object.assign(document.createElement("img"), { src: thumbnail, alt: "", width: 160, height: 160 });
  const name = Object.assign(document.createElement("span"), { textContent: style.name });
  const label = document.createElement("label");
  label.append(input, image, name);
  at("styles").append(label);
  styles.push(style);
  return input;
}

/** The input's file, which may be chosen again. */
function takeFile({ target }) {
  const [file] = target.files;
  target.value = "";
  return file;
}

async function openCamera() {
  try {
    at("video").srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: 1920 } } });
    at("viewfinder").showModal();
  } catch (error) {
    sayError(new Error(`the camera cannot be used (${error.message})`));
  }
}

function closeCamera() {
  for (const track of at("video").srcObject?.getTracks() ?? []) track.stop();
  at("video").srcObject = null;
}

async function shoot() {
  const video = at("video");
  const canvas = Object.assign(document.createElement("canvas"), { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  at("viewfinder").close();
  canvas.toBlob((blob) => choosePhotograph(blob && new File([blob], "camera.png")));
}

// ------------------------------------------------------------------------------------------------ the controls

at("photograph-file").addEventListener("change", (event) => choosePhotograph(takeFile(event)));
at("painting-file").addEventListener("change", (event) => choosePainting(takeFile(event)));
at("styles").addEventListener("change", paint);
at("size").addEventListener("change", paint);
at("strength").addEventListener("input", () => { at("strength-shown").textContent = `${at("strength").value} %`; });
at("strength").addEventListener("change", paint);
at("desk").addEventListener("submit", (event) => event.preventDefault());
at("save").addEventListener("click", save);
at("compare").addEventListener("click", () => compare(at("compare").getAttribute("aria-pressed") === "false"));
at("stop").addEventListener("click", stop);

at("camera").hidden = !navigator.mediaDevices?.getUserMedia; // only on https, and on the machine itself
at("camera").addEventListener("click", openCamera);
at("shoot").addEventListener("click", shoot);
at("leave").addEventListener("click", () => at("viewfinder").close());
at("viewfinder").addEventListener("close", closeCamera);

addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", () => document.body.classList.remove("dropping"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  const [file] = event.dataTransfer.files;
  if (event.target.closest("fieldset")) choosePainting(file);
  else choosePhotograph(file);
});

async function open() {
  try {
    if (location.protocol === "file:") throw new Error("a browser runs this page only from a web server, such as: python -m http.server");
    settings = await (await fetch("page.json")).json();
    settings.styles.forEach((style, number) => addStyle(style, `styles/${number}.jpg`));
    document.querySelector("[name=style]").checked = true;
    at("sources").hidden = !settings.hasSources;
    hirePainter();
    const sample = await (await fetch("photograph.jpg")).blob();
    await choosePhotograph(new File([sample], `${settings.photograph}.jpg`));
  } catch (error) {
    at("progress").hidden = true;
    sayError(error);
  }
}

open();
