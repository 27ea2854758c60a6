// The page: what is chosen, and what is shown. The work itself is done by painter.js, beside the page.
"use strict";

const RATE_EVERY = 2; // seconds over which the frames of the camera are counted

const at = (id) => document.getElementById(id);

let settings; // page.json: the styles, and the largest number of pixels
let styles = []; // { name, mean, std }: the bundled ones, then the visitor's own
let photograph; // { file, name, url, own, sizes }
let painted; // { url, name, width, height } of the picture that "save" saves
let wanted = false; // whether something has changed since the last painting began
let rate; // milliseconds that a pixel took last time
let live; // while the camera is painted: { tracks, isPaused, recorder, refresh, frames, since }

// ----------------------------------------------------------------------------------------------- the painter

let worker, ready, usesGpu;
let gpuFailure = ""; // why the GPU is left alone
const waiting = []; // { resolve, reject } of what was asked, in the order of the answers

class Stopped extends Error {}

/** Begins anew, with an empty memory; what was asked of the last painter ends with `Stopped`. */
function hirePainter() {
  worker?.terminate();
  const refuse = (error) => waiting.splice(0).forEach(({ reject }) => reject(error));
  refuse(new Stopped());
  worker = new Worker("painter.js", { type: "module" });
  worker.onmessage = ({ data: { result, error } }) => {
    const { resolve, reject } = waiting.shift();
    if (error === undefined) resolve(result);
    else reject(new Error(error));
  };
  worker.onerror = (event) => {
    event.preventDefault();
    refuse(new Error(event.message || "a file of the page is missing"));
  };
  ready = ask("start", { settings, withoutGpu: gpuFailure !== "" }).then(async ({ means, warning }) => {
    usesGpu = means === "the GPU";
    at("means").textContent = `Painted by ${settings.network} on ${means}.`;
    if (photograph) await ask("photograph", { file: photograph.file });
    return warning;
  });
  ready.catch(() => {}); // whoever waits for it hears of it
}

function ask(task, more = {}, moved = []) {
  return new Promise((resolve, reject) => {
    waiting.push({ resolve, reject });
    worker.postMessage({ task, ...more }, moved);
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
  if (live) return showLive();
  if (paint.isBusy) return;
  paint.isBusy = true;
  try {
    while (wanted && !live) {
      wanted = false;
      await paintOnce();
    }
  } finally {
    paint.isBusy = false;
  }
}

function chosen() {
  const { mean, std, name } = styles[document.querySelector("[name=style]:checked").value];
  return { mean, std, name, strength: at("strength").value / 100 };
}

/** What a picture of `subject` in the chosen style is called. */
const nameOf = (subject) => `${subject}-${chosen().name.toLowerCase().replaceAll(" ", "_")}`;

async function paintOnce() {
  const { mean, std, strength } = chosen();
  const name = nameOf(photograph.name);
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
    showPainted({ file, width, height, name });
    say(`${width} × ${height} pixels, painted in ${(milliseconds / 1000).toFixed(1)} s. ${gpuFailure || warning}`);
  } catch (error) {
    if (!(error instanceof Stopped)) recover(error, width, height);
    else if (live) wanted = true; // afterwards
    else say("Stopped.");
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
  if (!live) return download(painted.url, `${painted.name}.png`, painted);
  const [canvas, name] = [at("canvas"), `${nameOf("camera")}.png`];
  canvas.toBlob((file) => download(URL.createObjectURL(file), name, canvas));
}

function download(url, name, { width, height }) {
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
  say(`Saved ${name}, ${width} × ${height} pixels.`);
}

// --------------------------------------------------------------------------------------------- what is chosen

const stem = (name) => name.replace(/\.[^.]*$/, "");

async function choosePhotograph(file) {
  if (!file) return;
  wanted = false;
  endLive();
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

// -------------------------------------------------------------------------------------------------- the camera

/** The tracks of a camera or a microphone, once the visitor allows it. */
async function openMedia(name, wishes) {
  try {
    return (await navigator.mediaDevices.getUserMedia(wishes)).getTracks();
  } catch (error) {
    throw new Error(`the ${name} cannot be used (${error.message})`);
  }
}

const release = (tracks) => tracks.forEach((track) => track.stop());

async function startLive() {
  try {
    const tracks = await openMedia("camera", { video: { facingMode: "environment", width: { ideal: 1920 } } });
    if (live) return release(tracks);
    if (paint.isBusy) stop();
    live = { tracks, isPaused: false, frames: 0 };
    tracks[0].onended = () => endLive("The camera was disconnected.", true);
    at("video").srcObject = new MediaStream(tracks);
    document.body.classList.add("live");
    at("save").disabled = true;
    at("pause").focus({ preventScroll: true });
    showLive();
    await paintFrames(live);
  } catch (error) {
    sayError(error);
  }
}

/** Paints the newest frame again and again. Of those that come while one is painted none is kept. */
async function paintFrames(session) {
  while (live === session) {
    const newer = new Promise((resolve) => {
      at("video").requestVideoFrameCallback(resolve);
      session.refresh = resolve; // what is held is painted anew
    });
    await paintFrame(session);
    await newer;
  }
}

async function paintFrame(session) {
  const own = [at("video").videoWidth, at("video").videoHeight];
  const scale = Math.min(1, at("side").value / Math.min(...own));
  const [width, height] = own.map((length) => Math.round(scale * length));
  const size = { resizeWidth: width, resizeHeight: height, resizeQuality: "medium" };
  const frame = await createImageBitmap(at("video"), size).catch(() => null);
  if (!frame) return; // Chromium has none before the video is seen, nor while it is out of sight
  try {
    await ready;
    const picture = await ask("frame", { frame, ...chosen() }, [frame]);
    if (live !== session) return;
    const canvas = at("canvas");
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    canvas.getContext("2d", { alpha: false }).drawImage(picture, 0, 0);
    picture.close();
    at("live").style.setProperty("--aspect", width / height);
    at("save").disabled = false;
    at("record").disabled &&= live.isPaused;
    showRate(`${width} × ${height}`);
  } catch (error) {
    endLive();
    recover(error, width, height);
  }
}

function showRate(size) {
  const seconds = (performance.now() - (live.since ??= performance.now())) / 1000;
  if (seconds > RATE_EVERY) {
    at("rate").textContent = `${Number((live.frames / seconds).toPrecision(2))} frames a second, ${size}`;
    Object.assign(live, { frames: 0, since: performance.now() });
  }
  live.frames += 1;
}

/** Shows whether the camera is held or recorded, and paints anew what is held. */
function showLive() {
  at("pause").setAttribute("aria-pressed", live.isPaused);
  at("record").setAttribute("aria-pressed", Boolean(live.recorder));
  at("record").disabled = !live.recorder && (live.isPaused || at("save").disabled); // there is no frame yet
  at("side").disabled = Boolean(live.recorder);
  say(live.isPaused ? "Paused." : live.recorder ? "Recording the camera." : "Painting the camera.");
  live.refresh?.();
}

/** Holds the frame, or goes on; a clip waits as long. */
function pause() {
  Object.assign(live, { isPaused: !live.isPaused, frames: 0, since: undefined });
  if (live.isPaused) at("video").pause();
  else at("video").play();
  live.recorder?.[live.isPaused ? "pause" : "resume"]();
  at("rate").textContent = "";
  showLive();
}

function endLive(text = "The camera is off.", isError = false) {
  if (!live) return;
  if (live.recorder) saveClip();
  release(live.tracks);
  live = undefined;
  at("video").srcObject = null;
  document.body.classList.remove("live");
  at("rate").textContent = "";
  at("save").disabled = !painted;
  at("camera").focus({ preventScroll: true });
  say(text, isError);
  if (wanted) paint();
}

async function record() {
  if (live.recorder) return saveClip();
  try {
    if (!window.MediaRecorder) throw new Error("this browser cannot record clips (it has no MediaRecorder)");
    const sound = at("sound").checked ? await openMedia("microphone", { audio: true }) : [];
    if (!live || live.recorder) return release(sound);
    const mimeType = ["video/webm", "video/mp4"].find((type) => MediaRecorder.isTypeSupported(type));
    const stream = new MediaStream([...at("canvas").captureStream().getTracks(), ...sound]);
    const name = nameOf("camera");
    live.recorder = new MediaRecorder(stream, { mimeType });
    live.recorder.ondataavailable = ({ data }) => { // once, at its end
      download(URL.createObjectURL(data), `${name}.${/webm|mp4/.exec(data.type)}`, at("canvas"));
    };
    live.recorder.start();
    showLive();
  } catch (error) {
    sayError(error);
  }
}

function saveClip() {
  live.recorder.stop();
  release(live.recorder.stream.getTracks());
  live.recorder = undefined;
  showLive();
}

/** Takes what the camera sees now, whole, as the photograph. */
function shoot() {
  const video = at("video");
  const canvas = Object.assign(document.createElement("canvas"), { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
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
at("camera").addEventListener("click", startLive);
at("side").addEventListener("change", showLive);
at("pause").addEventListener("click", pause);
at("record").addEventListener("click", record);
at("shoot").addEventListener("click", shoot);
at("end").addEventListener("click", () => endLive());

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
