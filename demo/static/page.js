// The search form, its address and the results. Runs inside gr.HTML's js_on_load after viewer.js: `element` is the
// component's element, `server.find` the function `find` of demo/page.py.

const page = element.querySelector(".cots");
const find = (selector) => page.querySelector(selector);
const form = find(".search");
const grid = find(".grid");
const message = find(".message");
const further = find(".further");
const timing = find(".timing");
const introduction = find(".hero p");
const token = find(".token");
const text = form.elements.text;
const without = find("[name=without]");
const source = find("[name=source]");
const mode = find("[name=mode]");
const STEP = 30;
let picture = null; // {token, address}: a picture that the server holds for this search
let like = null; // {id, address}: a result whose neighbours are asked for
let turn = 0; // number of the latest request; the reply to an older one is dropped

function kind() {
  return find("[name=cots-kind]:checked").value;
}

function asked() {
  return Boolean(text.value.trim() || picture || like);
}

// --- the picture in the search box: a dropped, chosen or pasted file, or a result ---

function showToken(address, name) {
  token.hidden = false;
  token.classList.remove("gone");
  token.querySelector("img").src = address;
  token.querySelector(".token-name").textContent = name;
  text.placeholder = name === "Like this" ? "" : "Add words";
}

function dropToken() {
  picture = like = null;
  token.hidden = true;
  token.querySelector("img").removeAttribute("src");
  text.placeholder = placeholder;
}
const placeholder = text.placeholder;
token.querySelector("img").addEventListener("error", () => token.classList.add("gone")); // removed since, or its file is

async function takePicture(file) {
  const mine = ++turn;
  page.dataset.busy = "";
  try {
    const response = await fetch("query-picture", { method: "POST", body: file });
    const reply = await response.json();
    if (mine !== turn) return;
    if (!response.ok) return say(`${file.name || "The pasted data"}: ${reply.detail}`, false);
    like = null;
    picture = { token: reply.token, address: `query-picture/${reply.token}` };
    showToken(picture.address, file.name || "Pasted picture");
    await run();
  } catch {
    if (mine === turn) say(LOST);
  } finally {
    if (mine === turn) delete page.dataset.busy;
  }
}

// --- asking and showing ---

const LOST = "The page does not reach its server any more. Start it again with cots demo, then reload.";
const title = document.title;

// A sentence over what is on the page, or instead of it.
function say(sentence, instead = true) {
  message.textContent = sentence;
  message.hidden = false;
  window.scrollTo({ top: 0 });
  if (!instead) return;
  grid.replaceChildren();
  further.hidden = true;
  timing.replaceChildren();
}

function address() {
  const values = { q: text.value.trim(), without: without.value.trim(), kind: kind(), source: source.value, mode: mode.value, like: like?.id };
  const query = new URLSearchParams(Object.entries(values).filter(([, value]) => value));
  return query.size ? `?${query}` : location.pathname;
}

// What the form asks for; with nothing in it, a sampling of the gallery.
async function run({ remember = true, append = false } = {}) {
  const mine = ++turn;
  const shown = append ? grid.children.length : 0;
  const asItWas = !picture && new URL(address(), location.href).href === location.href;
  if (remember && !append && !asItWas) history.pushState(null, "", address());
  page.dataset.busy = "";
  page.dataset.view = asked() ? "results" : "start";
  markRefined();
  try {
    const reply = await server.find({
      text: text.value, without: without.value, kind: kind(), source: source.value, mode: mode.value,
      picture: picture?.token ?? "", like: like?.id ?? "", skip: shown, k: shown + STEP,
    });
    if (mine === turn) show(reply, append);
  } catch {
    if (mine === turn) say(LOST);
  } finally {
    if (mine === turn) delete page.dataset.busy;
  }
}

function show(reply, append) {
  if (reply.message) return say(reply.message);
  const first = append ? grid.children.length : 0;
  if (append) grid.insertAdjacentHTML("beforeend", reply.cards);
  else grid.innerHTML = reply.cards;
  message.hidden = true;
  further.hidden = !reply.more;
  introduction.textContent = reply.introduction;
  if (!append) timing.innerHTML = reply.timing;
  offerSources(reply.sources);
  find(".modes").hidden = !reply.captioned && !mode.value;
  preparePlayback(grid);
  if (append) grid.children[first]?.querySelector(".tile").focus({ preventScroll: true });
  else if (page.dataset.view === "results") window.scrollTo({ top: 0 });
}

function offerSources(names) {
  const chosen = source.value;
  source.replaceChildren(new Option("Any", ""), ...names.map((name) => new Option(name)));
  source.value = names.includes(chosen) ? chosen : "";
  find(".sources").hidden = names.length < 2;
}

function markRefined() {
  const refined = Boolean(source.value || mode.value || without.value.trim());
  find(".refine").toggleAttribute("data-active", refined);
  find(".clear").hidden = !refined;
  document.title = asked() ? `${text.value.trim() || "A picture"} · COTS` : title;
}

function moreLikeThis(card) {
  picture = null;
  text.value = "";
  like = { id: card.dataset.id, address: card.querySelector("img").src };
  showToken(like.address, "Like this");
  run();
}

// --- events ---

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!asked()) {
    turn++; // what is still on its way would overwrite the sentence
    delete page.dataset.busy;
    text.value = "";
    say("Type a few words, or drop in a picture, to search.", false);
    return text.focus();
  }
  if (touches) text.blur();
  run();
});
text.addEventListener("input", () => {
  if (like) dropToken();
});
without.addEventListener("keydown", (event) => {
  if (event.key === "Enter") run();
});
without.addEventListener("change", () => run());
source.addEventListener("change", () => run());
mode.addEventListener("change", () => run());
find(".kinds").addEventListener("change", () => run());
further.addEventListener("click", () => run({ append: true }));
find(".clear").addEventListener("click", () => {
  without.value = source.value = mode.value = "";
  run();
});
find(".token-remove").addEventListener("click", () => {
  dropToken();
  text.focus();
  run();
});
find(".brand").addEventListener("click", (event) => {
  if (event.metaKey || event.ctrlKey) return;
  event.preventDefault();
  text.value = without.value = source.value = mode.value = "";
  find("[name=cots-kind][value='']").checked = true;
  dropToken();
  run();
});
find(".refine").addEventListener("click", ({ currentTarget }) => {
  const open = currentTarget.getAttribute("aria-expanded") !== "true";
  currentTarget.setAttribute("aria-expanded", open);
  find(".more").hidden = !open;
  if (open) without.focus();
});
find(".examples").addEventListener("click", (event) => {
  const example = event.target.closest("button");
  if (!example) return;
  dropToken();
  text.value = example.textContent;
  run();
});
grid.addEventListener("click", (event) => {
  const card = event.target.closest(".card");
  if (!card) return;
  if (event.target.closest(".like")) return moreLikeThis(card);
  if (event.target.closest(".path")) return copyPath(event.target.closest(".path"), card.dataset.path);
  if (event.target.closest(".tile")) openViewer(card);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !event.target.closest("input, select, textarea, dialog")) {
    event.preventDefault();
    text.focus();
    text.select();
  }
});

find(".picture").addEventListener("click", () => find(".file").click());
find(".file").addEventListener("change", ({ currentTarget }) => {
  if (currentTarget.files.length) takePicture(currentTarget.files[0]);
  currentTarget.value = "";
});
form.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (!file) return;
  event.preventDefault();
  takePicture(file);
});
let depth = 0; // dragenter and dragleave also fire for the children of what is dragged over
const carriesFile = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragenter", (event) => {
  if (carriesFile(event) && ++depth) page.dataset.dropping = "";
});
document.addEventListener("dragleave", (event) => {
  if (carriesFile(event) && --depth <= 0) delete page.dataset.dropping;
});
document.addEventListener("dragover", (event) => {
  if (carriesFile(event)) event.preventDefault();
});
document.addEventListener("drop", (event) => {
  if (!carriesFile(event)) return;
  event.preventDefault();
  depth = 0;
  delete page.dataset.dropping;
  takePicture(event.dataTransfer.files[0]);
});

// --- light and dark: the system's unless chosen here ---

const asksForTheme = new URLSearchParams(location.search).get("__theme");
document.documentElement.dataset.theme = asksForTheme ?? localStorage.getItem("cots-theme") ?? "";
find(".theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("cots-theme", root.dataset.theme);
});

// --- the address: a search can be bookmarked, and "back" goes to the one before ---

function readAddress() {
  const query = new URLSearchParams(location.search);
  text.value = query.get("q") ?? "";
  without.value = query.get("without") ?? "";
  const name = query.get("source") ?? "";
  if (name) source.add(new Option(name)); // the gallery's sources come with the reply
  source.value = name;
  mode.value = query.get("mode") ?? "";
  (find(`[name=cots-kind][value="${CSS.escape(query.get("kind") ?? "")}"]`) ?? find("[name=cots-kind]")).checked = true;
  dropToken();
  if (query.get("like")) {
    like = { id: query.get("like"), address: `thumb/${encodeURIComponent(query.get("like"))}` };
    showToken(like.address, "Like this");
  }
  run({ remember: false });
}
window.addEventListener("popstate", readAddress);
readAddress();
if (!touches) text.focus({ preventScroll: true });
