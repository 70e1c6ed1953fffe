"use strict";

// Draws what the server found; the slider hides what has a lower score, without asking again.
const SVG = "http://www.w3.org/2000/svg";
const [file, score, output, status] = ["#file", "#score", "output", "#status"].map((name) => document.querySelector(name));
const maxBytes = Number(document.body.dataset.maxBytes);
let found = null;

function say(text, problem = false) {
  status.textContent = text;
  status.classList.toggle("problem", problem);
}

function shape(parent, name, attributes, text = "") {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text; // as it is: a class may have any name
  parent.append(element);
}

function path(outline) {
  // Through the middle of pixels.
  const points = (line) => line.map((value) => value + 0.5).join(" ");
  return outline.map((line) => `M${points(line)}Z`).join("");
}

function colour(label) {
  let hash = 0;
  for (const letter of label) hash = (31 * hash + letter.codePointAt(0)) % 10007;
  return `hsl(${(137.5 * hash) % 360} 85% 50%)`; // names that differ in a letter get colours that are far apart
}

function draw() {
  output.textContent = Number(score.value).toFixed(2);
  if (!found) return;
  const size = Math.max(found.width, found.height) / 28;
  document.querySelectorAll("section").forEach((section, i) => {
    const { milliseconds, detections } = found.columns[i];
    const shown = detections.filter((detection) => detection.score >= Number(score.value));
    section.querySelector(".milliseconds").textContent = milliseconds.toFixed(1);
    section.querySelector(".count").textContent = `${shown.length} of ${detections.length} detections`;
    const svg = section.querySelector("svg");
    svg.setAttribute("viewBox", `0 0 ${found.width} ${found.height}`);
    svg.replaceChildren();
    shape(svg, "image", { href: found.picture, width: found.width, height: found.height });
    shown.reverse(); // the best above the others, and names above all
    for (const { label, outline } of shown) {
      const stroke = colour(label);
      if (outline.length) shape(svg, "path", { d: path(outline), fill: stroke, stroke });
    }
    for (const { label, box: [x1, y1, x2, y2] } of shown) {
      const stroke = colour(label);
      shape(svg, "rect", { x: x1, y: y1, width: Math.max(0, x2 - x1), height: Math.max(0, y2 - y1), stroke });
    }
    for (const { label, score: value, box: [x1, y1, x2] } of shown) {
      const place = { y: Math.max(y1, 0) + size, "font-size": size, "stroke-width": size / 6 };
      if (x1 > 0.7 * found.width) Object.assign(place, { x: x2 - size / 6, "text-anchor": "end" });
      else place.x = x1 + size / 6;
      shape(svg, "text", place, `${label} ${value.toFixed(2)}`);
    }
  });
}

async function detect(picture) {
  if (!picture || file.disabled) return;
  if (picture.size > maxBytes) {
    say(`${picture.name}: The picture has ${picture.size} bytes, more than the ${maxBytes} that this server takes.`, true);
    return;
  }
  say("Detecting ...");
  file.disabled = true;
  document.body.classList.add("busy");
  try {
    const headers = { "Content-Type": "application/octet-stream" };
    const response = await fetch("detect", { method: "POST", headers, body: picture });
    const answer = await response.json();
    if (response.ok) {
      found = answer;
      say(`${picture.name}, ${found.width} x ${found.height} pixels`);
      draw();
    } else {
      say(`${picture.name}: ${answer.problem}`, true);
    }
  } catch {
    say("The server did not answer; does it still run?", true);
  } finally {
    file.disabled = false;
    file.value = "";
    document.body.classList.remove("busy");
  }
}

file.addEventListener("change", () => detect(file.files[0]));
score.addEventListener("input", draw);
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
document.addEventListener("dragleave", () => document.body.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  detect(event.dataTransfer.files[0]);
});
draw(); // a browser keeps the slider over a reload
