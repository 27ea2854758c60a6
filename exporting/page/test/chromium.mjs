// Headless Chromium and static servers, for the test and for measure.mjs. CHROMIUM and PYTHON name the programs.

import { spawn } from "node:child_process";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

export const HERE = dirname(fileURLToPath(import.meta.url));
export const PYTHON = process.env.PYTHON ?? "python3";
export const WAIT = 240_000; // milliseconds: a busy machine

// What asks other places for something is off; the camera is a pattern.
const FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
  "--disable-background-networking", "--disable-component-update", "--use-fake-device-for-media-stream=fps=30", "--use-fake-ui-for-media-stream"];

/** A browser with a new, empty profile in `folder`. */
export function launch(folder) {
  const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";
  return chromium.launchPersistentContext(folder, { executablePath, args: FLAGS, acceptDownloads: true });
}

/** Serves a folder: { address, stop }. With threads where `isIsolated`, by exporting/page/serve.py; else by Python's own server. */
export async function serve(folder, isIsolated = false) {
  const words = isIsolated ? [join(HERE, "..", "serve.py"), folder, "0"]
    : ["-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", folder];
  const server = spawn(PYTHON, ["-u", ...words]);
  const line = await new Promise((resolve, reject) => {
    server.stdout.once("data", (text) => resolve(String(text)));
    server.once("exit", () => reject(new Error("the server ended")));
  });
  return { address: line.match(/http:\/\/[\w.:]+\//)[0], stop: () => server.kill() };
}
