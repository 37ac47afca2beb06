// Clips that play in the grid, and the viewer that opens on a result. Runs inside gr.HTML's js_on_load, before page.js.

const viewer = element.querySelector(".viewer");
const stage = viewer.querySelector(".stage");
const touches = matchMedia("(pointer: coarse)").matches;
let onView = null; // the card that the viewer shows

// A clip loops inside its moment: #t=start,end pauses the browser at the end once, it does not loop.
function loopMoment(video, { start, end }) {
  const [from, to] = [Number(start), Number(end)];
  if (!(to > from)) return (video.loop = true);
  const again = () => {
    video.currentTime = from;
    video.play().catch(() => {});
  };
  video.addEventListener("timeupdate", () => {
    if (!video.paused && (video.currentTime >= to - 0.04 || video.currentTime < from - 0.5)) again();
  });
  video.addEventListener("pause", () => {
    if (video.dataset.wanted && video.currentTime >= to - 0.25) again();
  });
  video.addEventListener("ended", again);
}

function play(tile) {
  const clip = tile.querySelector("video, .moving");
  if (!clip || tile.dataset.wanted) return;
  tile.dataset.wanted = "1";
  if (clip.matches(".moving")) {
    clip.src = clip.dataset.src;
    tile.classList.add("playing");
    return;
  }
  if (!clip.src) {
    clip.src = clip.dataset.src;
    loopMoment(clip, tile.closest(".card").dataset);
    clip.addEventListener("playing", () => tile.dataset.wanted && tile.classList.add("playing"));
  }
  clip.dataset.wanted = "1";
  clip.play().catch(() => {}); // a codec that the browser lacks: the still stays
}

function rest(tile) {
  const clip = tile.querySelector("video, .moving");
  if (!clip) return;
  delete tile.dataset.wanted;
  tile.classList.remove("playing");
  if (clip.matches(".moving")) return clip.removeAttribute("src");
  delete clip.dataset.wanted;
  clip.pause();
}

// A finger does not hover: on touch screens the clips in the middle of the screen play.
const inSight = new IntersectionObserver(
  (entries) => entries.forEach(({ target, isIntersecting }) => (isIntersecting ? play(target) : rest(target))),
  { rootMargin: "-30% 0px -30% 0px", threshold: 0.4 },
);

function preparePlayback(grid) {
  inSight.disconnect();
  if (!touches || matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  grid.querySelectorAll(".card[data-kind=video] .tile").forEach((tile) => inSight.observe(tile));
}

function hover(event, act) {
  const card = event.pointerType === "mouse" && event.target.closest(".card[data-kind=video]");
  if (card && !card.contains(event.relatedTarget)) act(card.querySelector(".tile"));
}
element.addEventListener("pointerover", (event) => hover(event, play));
element.addEventListener("pointerout", (event) => hover(event, rest));
element.addEventListener("focusin", (event) => event.target.matches(".card[data-kind=video] .tile:focus-visible") && play(event.target));
element.addEventListener("focusout", (event) => event.target.matches(".card[data-kind=video] .tile") && rest(event.target));

// `error` does not bubble: caught on the way down
element.addEventListener(
  "error",
  (event) => {
    if (event.target.matches(".tile img.still")) event.target.closest(".tile").classList.add("gone");
    if (event.target.matches(".stage video")) showStill(onView);
  },
  true,
);

async function copyPath(button, path) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(path);
  } catch {
    const area = document.createElement("textarea"); // without https or localhost there is no clipboard API
    area.value = path;
    button.after(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  if (button.classList.contains("copied")) return;
  button.classList.add("copied");
  button.textContent = "Path copied";
  setTimeout(() => {
    button.classList.remove("copied");
    button.textContent = label;
  }, 1400);
}

// --- viewer ---

// A small picture blown up to the whole stage shows its pixels, not itself.
function limit(medium, width, height) {
  medium.style.maxWidth = `${3 * width}px`;
  medium.style.maxHeight = `min(${3 * height}px, 100%)`;
}

function showStill(card) {
  const still = new Image();
  still.alt = card.dataset.caption;
  still.src = card.dataset.large;
  still.onload = () => limit(still, still.naturalWidth, still.naturalHeight);
  still.onerror = () => card === onView && showLoss();
  stage.replaceChildren(still);
}

function showLoss() {
  const sentence = document.createElement("p");
  sentence.textContent = "This file is no longer there.";
  stage.replaceChildren(sentence);
  viewer.querySelector(".viewer-open").hidden = true;
}

function showClip(card) {
  const video = document.createElement("video");
  Object.assign(video, { src: card.dataset.media, poster: card.dataset.large, muted: true, controls: true, playsInline: true });
  video.setAttribute("aria-label", card.dataset.caption);
  video.onloadedmetadata = () => limit(video, video.videoWidth, video.videoHeight);
  stage.replaceChildren(video);
  video.currentTime = Number(card.dataset.start) || 0;
  video.play().catch(() => {});
}

function row(name, value, copies) {
  if (!value) return [];
  const term = document.createElement("dt");
  term.textContent = name;
  const detail = document.createElement("dd");
  const holder = copies ? detail.appendChild(document.createElement("button")) : detail;
  if (copies) holder.append(...value.split(/(?<=[/\\])/).flatMap((part) => [part, document.createElement("wbr")]));
  else holder.textContent = value;
  if (copies) Object.assign(holder, { type: "button", title: "Copy the path", onclick: () => copyPath(holder, value) });
  const group = document.createElement("div");
  group.classList.toggle("copies", Boolean(copies));
  group.append(term, detail);
  return [group];
}

function fillViewer(card) {
  onView = card;
  viewer.querySelector(".viewer-open").hidden = false;
  const about = card.dataset;
  if (about.player) showClip(card);
  else showStill(card);
  viewer.querySelector(".viewer-caption").textContent = about.caption;
  viewer.querySelector(".viewer-others").textContent = about.others;
  viewer.querySelector("dl").replaceChildren(
    ...row("Best moment", about.moment),
    ...row("Similarity", about.score),
    ...row("Source", about.source),
    ...row("Licence", about.licence),
    ...row("Path", about.path, true),
  );
  viewer.querySelector(".details").scrollTop = 0;
  viewer.querySelector(".viewer-open").href = about.media;
  viewer.querySelector(".previous").disabled = !card.previousElementSibling;
  viewer.querySelector(".next").disabled = !card.nextElementSibling;
}

function openViewer(card) {
  fillViewer(card);
  viewer.showModal();
  viewer.querySelector(".viewer-like").focus({ focusVisible: false, preventScroll: true }); // below a long caption
}

function step(side) {
  const card = onView?.[side];
  if (card) fillViewer(card);
}

viewer.querySelector(".previous").addEventListener("click", () => step("previousElementSibling"));
viewer.querySelector(".next").addEventListener("click", () => step("nextElementSibling"));
viewer.querySelector(".close").addEventListener("click", () => viewer.close());
viewer.querySelector(".viewer-like").addEventListener("click", () => {
  viewer.close();
  moreLikeThis(onView);
});
viewer.addEventListener("click", (event) => event.target === viewer && viewer.close());
viewer.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") step("previousElementSibling");
  if (event.key === "ArrowRight") step("nextElementSibling");
});
viewer.addEventListener("close", () => {
  stage.replaceChildren();
  onView?.querySelector(".tile")?.focus({ preventScroll: true });
});
