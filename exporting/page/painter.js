// The painter: a worker that decodes pictures, runs the two graphs on them, and encodes what comes out.
// page.js sends it { task, ... } and gets { result } or { error } back, in the order in which it asked.

const TOLERANCE = 3; // of 255: how far this browser may be from PyTorch in the picture of `settings.check`
const LONGEST_SIDES = [3072, 2048, 1024, 512]; // pixels: the sizes that are offered below a photograph's own

let settings; // of page.json: the largest number of pixels, and a picture with its right answer
let ort, styleGraph, contentGraph;
let photograph; // an ImageBitmap

const tasks = { start, photograph: takePhotograph, painting: takePainting, paint, frame: paintFrame };
let last = Promise.resolve(); // one task at a time: the runtime takes no second picture before it is done with the first

onmessage = ({ data: { task, ...more } }) => {
  last = last.then(async () => {
    try {
      const result = await tasks[task](more);
      postMessage({ result }, result instanceof ImageBitmap ? [result] : []);
    } catch (error) {
      postMessage({ error: error?.message || String(error) }); // the runtime also throws bare numbers
    }
  });
};

// ---------------------------------------------------------------------------------------------- starting

/** Loads runtime and graphs. Says what computes: { means, warning }; the GPU only where it computes rightly. */
async function start({ settings: given, withoutGpu }) {
  settings = given;
  refuseAlteredPixels();
  const threads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, 8) : 1;
  let warning = "";
  if (!withoutGpu && (await hasGpu())) {
    try {
      ort = await import("./ort.jspi.bundle.min.mjs");
      ort.env.wasm.numThreads = threads;
      await openGraphs("webgpu");
      if ((await differenceFromPyTorch()) <= TOLERANCE) return { means: "the GPU", warning };
      warning = "This GPU computes wrongly, so the processor paints.";
    } catch (error) {
      warning = `This GPU cannot be used (${error?.message || error}), so the processor paints.`;
    }
  }
  ort ??= await import("./ort.wasm.bundle.min.mjs");
  ort.env.wasm.numThreads = threads;
  await openGraphs("wasm");
  const difference = await differenceFromPyTorch();
  if (!(difference <= TOLERANCE)) throw new Error(`this browser computes wrongly (by ${difference} of 255)`);
  return { means: threads === 1 ? "one thread of the processor" : `${threads} threads of the processor`, warning };
}

/** Whether there is WebGPU on real hardware, and what the runtime for it needs: promises in WebAssembly. */
async function hasGpu() {
  const adapter = "Suspending" in WebAssembly && (await navigator.gpu?.requestAdapter());
  return Boolean(adapter) && !adapter.info?.isFallbackAdapter;
}

async function openGraphs(provider) {
  const open = (file) => ort.InferenceSession.create(file, { executionProviders: [provider], logSeverityLevel: 3 });
  styleGraph = await open("style.onnx");
  contentGraph = await open("content.onnx");
}

/** The largest difference, of 255, from the picture that PyTorch painted of a pattern in its own style. */
async function differenceFromPyTorch() {
  const { width, height, picture } = settings.check;
  const pattern = Float32Array.from({ length: 3 * height * width }, (_, place) => ((place * 37) % 256) / 255);
  const style = await styleGraph.run({ style: new ort.Tensor("float32", pattern, [1, 3, height, width]) });
  const painted = await runContent(pattern, width, height, style.mean.data, style.std.data, 1);
  return painted.reduce((most, value, place) => Math.max(most, Math.abs(255 * value - picture[place])), 0);
}

/** Some browsers add noise to the pixels that a page reads, against fingerprinting; it would be painted. */
function refuseAlteredPixels() {
  const canvas = blank(16, 16);
  const pixels = canvas.getImageData(0, 0, 16, 16);
  for (let place = 0; place < pixels.data.length; place++) pixels.data[place] = place % 4 === 3 ? 255 : (place * 37) % 256;
  canvas.putImageData(pixels, 0, 0);
  const read = canvas.getImageData(0, 0, 16, 16).data;
  if (read.some((value, place) => value !== pixels.data[place])) {
    throw new Error("this browser alters the pixels that a page reads (a protection against fingerprinting); allow this page to read them");
  }
}

// ---------------------------------------------------------------------------------------------- pictures

/** A white drawing surface in sRGB. */
function blank(width, height) {
  const canvas = new OffscreenCanvas(width, height).getContext("2d", { alpha: false, willReadFrequently: true });
  canvas.fillStyle = "#fff";
  canvas.fillRect(0, 0, width, height);
  canvas.imageSmoothingQuality = "high";
  return canvas;
}

/** Upright, in sRGB, whole: as `--mode test` decodes. */
async function decode(file) {
  try {
    return await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "this file"} cannot be read as a picture`);
  }
}

/** The size at which a picture is painted: its own, unless that is too large. */
function fit({ width, height }, longest = Infinity) {
  const scale = Math.min(1, Math.sqrt(settings.maxPixels / (width * height)), longest / Math.max(width, height));
  const side = (length) => Math.max(1, scale === 1 ? length : Math.floor(length * scale));
  return { width: side(width), height: side(height) };
}

/** The picture on white as (3, H, W), 0..1. */
function toPlanes(bitmap, width, height) {
  const canvas = blank(width, height);
  canvas.drawImage(bitmap, 0, 0, width, height);
  const { data } = canvas.getImageData(0, 0, width, height);
  const size = width * height;
  const planes = new Float32Array(3 * size);
  for (let place = 0; place < size; place++) {
    for (let colour = 0; colour < 3; colour++) planes[colour * size + place] = data[4 * place + colour] / 255;
  }
  return planes;
}

/** (3, H, W), 0..1, as an OffscreenCanvas. */
function toCanvas(planes, width, height) {
  const canvas = blank(width, height);
  const pixels = canvas.getImageData(0, 0, width, height);
  const size = width * height;
  for (let place = 0; place < size; place++) {
    for (let colour = 0; colour < 3; colour++) pixels.data[4 * place + colour] = 255 * planes[colour * size + place];
  }
  canvas.putImageData(pixels, 0, 0);
  return canvas.canvas;
}

// ----------------------------------------------------------------------------------------------- painting

/** Keeps the photograph to be painted. Returns its own size, and those at which it can be painted, largest first. */
async function takePhotograph({ file }) {
  const bitmap = await decode(file);
  photograph?.close();
  photograph = bitmap;
  const largest = fit(bitmap);
  const smaller = LONGEST_SIDES.filter((side) => side < Math.max(largest.width, largest.height));
  const own = { width: bitmap.width, height: bitmap.height };
  return { own, sizes: [largest, ...smaller.map((side) => fit(bitmap, side))] };
}

/** All that is taken from a painting: mean and std of every channel; and the size at which it was looked at. */
async function takePainting({ file }) {
  const bitmap = await decode(file);
  const { width, height } = fit(bitmap);
  const planes = toPlanes(bitmap, width, height);
  const isReduced = width !== bitmap.width;
  bitmap.close();
  const { mean, std } = await styleGraph.run({ style: new ort.Tensor("float32", planes, [1, 3, height, width]) });
  return { mean: mean.data, std: std.data, width, height, isReduced };
}

/** Paints the photograph at one of its sizes. mean, std: of the style; strength: 0..1. */
async function paint({ mean, std, strength, width, height }) {
  const begun = performance.now();
  const planes = await runContent(toPlanes(photograph, width, height), width, height, mean, std, strength);
  const milliseconds = performance.now() - begun;
  return { file: await toCanvas(planes, width, height).convertToBlob({ type: "image/png" }), milliseconds };
}

/** Paints a frame of the camera, an ImageBitmap, as another. */
async function paintFrame({ frame, mean, std, strength }) {
  const { width, height } = frame;
  const planes = toPlanes(frame, width, height);
  frame.close();
  return toCanvas(await runContent(planes, width, height, mean, std, strength), width, height).transferToImageBitmap();
}

async function runContent(planes, width, height, mean, std, strength) {
  const code = (values) => new ort.Tensor("float32", Float32Array.from(values), [1, values.length, 1, 1]);
  const { picture } = await contentGraph.run({
    content: new ort.Tensor("float32", planes, [1, 3, height, width]),
    mean: code(mean), std: code(std), strength: new ort.Tensor("float32", [strength], [1]),
  });
  if (picture.dims[2] !== height || picture.dims[3] !== width) throw new Error(`painted ${picture.dims} in place of ${width} x ${height}`);
  return picture.data;
}
