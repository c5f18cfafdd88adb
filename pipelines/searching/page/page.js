// Asks the server and shows what it found. Everything that comes from documents is set as text, never as markup.
"use strict";

const MAX_IMAGE_BYTES = 32 * 2 ** 20;
const KINDS = { page: "page", image: "image", text: "passage" };

const byId = (id) => document.getElementById(id);
const [form, text, file, hits, error, status_, asked, askedImage, drop] =
  ["form", "text", "file", "hits", "error", "status", "asked", "asked-image", "drop"].map(byId);
let latest = 0; // the answer to an earlier question must not take the place of a later one

// Whether what was found is shown: nothing is of an error, or of an answer that came too late.
async function ask(address, options) {
  const question = ++latest;
  error.hidden = true;
  status_.textContent = "Searching";
  document.body.setAttribute("aria-busy", "true");
  let found = [];
  let said = "";
  try {
    const response = await fetch(address, { method: "POST", ...options });
    const answer = await response.json();
    if (response.ok) found = answer.hits;
    else said = answer.error;
  } catch {
    said = "The server does not answer. Is it still running?";
  }
  if (question !== latest) return false;
  document.body.removeAttribute("aria-busy");
  hits.replaceChildren(...found.map(card));
  status_.textContent = said ? "" : found.length === 1 ? "1 result" : `The ${found.length} nearest, best first`;
  show(said);
  return !said;
}

function show(words) {
  error.textContent = words;
  error.hidden = !words;
}

function card(hit) {
  const item = byId("hit").content.cloneNode(true).querySelector("li");
  const one = (selector) => item.querySelector(selector);
  const folders = hit.path.split("/");
  one("h2").textContent = folders.pop();
  const where = hit.numbers > 1 ? `${KINDS[hit.kind]} ${hit.number} of ${hit.numbers}` : KINDS[hit.kind];
  one(".place").textContent = [where, folders.join("/")].filter(Boolean).join(" · ");
  one(".snippet").textContent = hit.snippet;
  one("meter").value = Math.max(0, hit.score);
  one(".score span").textContent = hit.score.toFixed(3);
  one("a").href = `/document/${hit.id}` + (hit.kind === "page" ? `#page=${hit.number}` : "");
  if (hit.has_picture) {
    one("img").src = `/picture/${hit.id}`;
    one("img").alt = hit.kind === "text" ? "The first image of this passage" : "";
  } else {
    one("figure").remove();
    item.classList.add("no-picture");
  }
  return item;
}

function askImage(image) {
  if (askedImage.src) URL.revokeObjectURL(askedImage.src);
  asked.hidden = true;
  hits.replaceChildren();
  if (image.size > MAX_IMAGE_BYTES) {
    latest++;
    status_.textContent = "";
    show(`This file is too large: at most ${MAX_IMAGE_BYTES / 2 ** 20} MiB are read.`);
    return;
  }
  text.value = "";
  // Shown only once the server has read it: a browser would otherwise decode what the server refuses.
  ask("/search/image", { body: image, headers: { "Content-Type": "application/octet-stream" } }).then((shown) => {
    if (!shown) return;
    askedImage.src = URL.createObjectURL(image);
    asked.hidden = false;
  });
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  asked.hidden = true;
  ask("/search/text", { body: JSON.stringify({ text: text.value }), headers: { "Content-Type": "application/json" } });
});

file.addEventListener("change", () => {
  if (file.files.length) askImage(file.files[0]);
  file.value = "";
});

document.addEventListener("paste", (event) => {
  const image = [...event.clipboardData.files].find((pasted) => pasted.type.startsWith("image/"));
  if (image) askImage(image);
});

let inside = 0; // drag events come for every element on the way
const carriesFiles = (event) => event.dataTransfer.types.includes("Files");
document.addEventListener("dragenter", (event) => {
  if (!carriesFiles(event)) return;
  inside++;
  drop.hidden = false;
});
document.addEventListener("dragleave", (event) => {
  if (carriesFiles(event) && --inside === 0) drop.hidden = true;
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  inside = 0;
  drop.hidden = true;
  if (event.dataTransfer.files.length) askImage(event.dataTransfer.files[0]);
});

fetch("/about").then((response) => response.json()).then((about) => {
  byId("folder").textContent = about.folder;
  byId("about").textContent = `${about.entries} pages and passages of ${about.files} files`;
  document.title = `Search ${about.folder}`;
});
