"use strict";

for (const select of document.querySelectorAll("[data-chooses]")) {
  const panels = document.querySelectorAll(`[data-panel=${select.dataset.chooses}]`);
  select.addEventListener("change", () => {
    panels.forEach((panel, number) => {
      panel.hidden = number !== Number(select.value);
      panel.dispatchEvent(new Event(panel.hidden ? "leave" : "enter"));
    });
  });
  // Browsers keep the selection when the user returns to the page.
  if (select.value !== "0") select.dispatchEvent(new Event("change"));
}

function startPlayer(root) {
  const video = root.querySelector("video");
  const canvases = [...root.querySelectorAll("canvas")];
  const slider = root.querySelector("input[type=range]");
  const button = root.querySelector(".play");
  const position = root.querySelector(".position");
  const speed = root.querySelector(".speed select");
  const curves = [...root.querySelectorAll(".curve")].map((figure) => ({
    texts: JSON.parse(figure.dataset.texts),
    output: figure.querySelector("output"),
    cursor: figure.querySelector(".cursor"),
    plot: figure.querySelector("svg"),
    name: figure.querySelector("figcaption span").textContent,
  }));
  const fps = Number(root.dataset.fps);
  const last = Number(root.dataset.frames) - 1;
  let frame = 0;
  let wanted = null;

  video.controls = false;
  video.tabIndex = -1;
  video.setAttribute("aria-hidden", "true");

  function draw() {
    const width = video.videoWidth / canvases.length;
    canvases.forEach((canvas, number) => {
      canvas.getContext("2d").drawImage(
        video, number * width, 0, width, video.videoHeight, 0, 0, canvas.width, canvas.height,
      );
    });
    root.dataset.drawn = frame;
  }

  function tell() {
    slider.value = frame;
    position.textContent = `${frame + 1} / ${last + 1}`;
    for (const curve of curves) {
      curve.output.textContent = curve.texts[frame];
      const x = (1000 * frame) / Math.max(1, last);
      curve.cursor.setAttribute("x1", x);
      curve.cursor.setAttribute("x2", x);
    }
    const measures = curves.map((curve) => `, ${curve.name} ${curve.texts[frame]}`).join("");
    slider.setAttribute("aria-valuetext", `frame ${frame + 1} of ${last + 1}${measures}`);
  }

  // One seek at a time: a slider moves faster than a video can follow.
  function go(to) {
    video.pause();
    frame = Math.max(0, Math.min(last, to));
    tell();
    if (wanted === null) seek();
    wanted = frame;
  }

  function seek() {
    // The middle of a frame, whatever the rounding.
    video.currentTime = (frame + 0.5) / fps;
  }

  video.addEventListener("seeked", () => {
    const reached = wanted;
    wanted = null;
    if (reached !== null && reached !== frame) {
      seek();
      wanted = frame;
      return;
    }
    if (reached !== null) draw();
  });

  function follow(time) {
    frame = Math.max(0, Math.min(last, Math.floor(time * fps + 0.25)));
    draw();
    tell();
  }

  function watch() {
    if (video.paused) return;
    if (video.requestVideoFrameCallback) {
      video.requestVideoFrameCallback((now, seen) => {
        if (video.paused) return;
        follow(seen.mediaTime);
        watch();
      });
    } else {
      requestAnimationFrame(() => {
        if (video.paused) return;
        follow(video.currentTime);
        watch();
      });
    }
  }

  function toggle() {
    if (video.paused) {
      wanted = null;
      video.playbackRate = Number(speed.value);
      video.play().catch(() => {});
    } else {
      go(frame);
    }
  }

  video.addEventListener("play", () => {
    root.classList.add("playing");
    button.setAttribute("aria-label", "Pause");
    watch();
  });
  video.addEventListener("pause", () => {
    root.classList.remove("playing");
    button.setAttribute("aria-label", "Play");
  });
  video.addEventListener("error", () => {
    root.querySelector(".unplayable").hidden = false;
  });
  const ready = () => go(frame);
  if (video.readyState >= 2) ready();
  else video.addEventListener("loadeddata", ready, { once: true });
  if (video.error) root.querySelector(".unplayable").hidden = false;

  button.addEventListener("click", toggle);
  slider.addEventListener("input", () => go(Number(slider.value)));
  speed.addEventListener("change", () => {
    video.playbackRate = Number(speed.value);
  });
  root.addEventListener("leave", () => go(frame));
  root.addEventListener("keydown", (event) => {
    if (event.target.matches("select") || event.ctrlKey || event.metaKey || event.altKey) return;
    const moves = { ArrowRight: frame + 1, ArrowUp: frame + 1, ArrowLeft: frame - 1,
      ArrowDown: frame - 1, PageDown: frame - 10, PageUp: frame + 10, Home: 0, End: last };
    if (event.key in moves) go(moves[event.key]);
    else if (event.key === " " && event.target !== button) toggle();
    else return;
    event.preventDefault();
  });
  for (const { plot } of curves) {
    const point = (event) => {
      const box = plot.getBoundingClientRect();
      go(Math.round(((event.clientX - box.left) / box.width) * last));
    };
    plot.addEventListener("pointerdown", (event) => {
      plot.setPointerCapture(event.pointerId);
      point(event);
    });
    plot.addEventListener("pointermove", (event) => {
      if (event.buttons) point(event);
    });
  }
  tell();
}

function startMap(root) {
  const tip = document.querySelector(".tip");
  const rows = [...root.querySelectorAll("tbody tr")].map((row) => [...row.querySelectorAll("td")]);
  let current = rows[0][0];
  let shown = null;

  function show(cell) {
    if (shown) shown.classList.remove("shown");
    shown = cell;
    tip.hidden = !cell;
    if (!cell) return;
    cell.classList.add("shown");
    tip.textContent = cell.getAttribute("aria-label");
    const box = cell.getBoundingClientRect();
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    const left = box.left + box.width / 2 - tip.offsetWidth / 2;
    tip.style.left = `${Math.max(8, Math.min(room, left)) + window.scrollX}px`;
    tip.style.top = `${box.top - tip.offsetHeight - 6 + window.scrollY}px`;
  }

  root.addEventListener("pointerover", (event) => show(event.target.closest("td")));
  root.addEventListener("pointerleave", () => show(null));
  root.addEventListener("focusin", (event) => show(event.target.closest("td")));
  root.addEventListener("focusout", () => show(null));
  root.addEventListener("click", (event) => {
    const cell = event.target.closest("td");
    if (cell) visit(cell);
  });
  root.addEventListener("keydown", (event) => {
    const row = rows.findIndex((cells) => cells.includes(current));
    const column = rows[row].indexOf(current);
    const end = rows[row].length - 1;
    const moves = { ArrowRight: [row, column + 1], ArrowLeft: [row, column - 1],
      ArrowDown: [row + 1, column], ArrowUp: [row - 1, column], Home: [row, 0], End: [row, end] };
    if (event.key === "Escape") show(null);
    if (!(event.key in moves)) return;
    event.preventDefault();
    const [to, at] = moves[event.key];
    const cell = (rows[to] || [])[at];
    if (cell) visit(cell);
  });

  function visit(cell) {
    current.tabIndex = -1;
    current = cell;
    cell.tabIndex = 0;
    cell.focus();
  }
}

document.querySelectorAll(".player").forEach(startPlayer);
document.querySelectorAll(".map").forEach(startMap);

const copy = document.querySelector(".copy");
if (copy) {
  const code = document.querySelector("pre code");
  const status = document.querySelector("[role=status]");
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      // If the page may not use the clipboard, select the text and try the old copy command.
      getSelection().selectAllChildren(code);
      if (!document.execCommand("copy")) return;
    }
    copy.textContent = "Copied";
    status.textContent = "The command was copied.";
    setTimeout(() => {
      copy.textContent = "Copy";
      status.textContent = "";
    }, 2000);
  });
}
