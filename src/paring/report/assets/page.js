// What every section uses: sorting, opening rows, copying, following links to rows. Names are only ever set as text.

const find = (selector, root = document) => root.querySelector(selector);
const findAll = (selector, root = document) => [...root.querySelectorAll(selector)];
const data = JSON.parse(find("#data").textContent);
const fillers = []; // (row group) => what goes into its empty details, or nothing

function say(text) {
  find("#said").textContent = text;
}

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.filter((child) => child !== null));
  return made;
}

// -- sorting ----------------------------------------------------------------------------------------------------

function valueOf(group, column) {
  const cell = group.rows[0].cells[column];
  const text = cell.dataset.v ?? cell.textContent.trim();
  if (cell.dataset.v === "" || text === "–") return null;
  return Number.isNaN(Number(text)) ? text : Number(text);
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a < b ? -1 : a > b ? 1 : 0;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

function sortBy(heading) {
  const table = heading.closest("table");
  const first = heading.dataset.first;
  const other = first === "ascending" ? "descending" : "ascending";
  const order = heading.getAttribute("aria-sort") === first ? other : first;
  for (const old of findAll("th[aria-sort]", table)) old.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const groups = [...table.tBodies].map((group) => [valueOf(group, heading.cellIndex), group]);
  groups.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null); // none is last in either order
    return sign * compare(a, b);
  });
  table.append(...groups.map(([, group]) => group));
  say(`Sorted by ${heading.textContent.trim()}, ${order}`);
}

// -- opening a row ----------------------------------------------------------------------------------------------

function setOpen(group, open) {
  const detail = find(".detail", group);
  const place = detail.cells[0];
  if (open && !place.hasChildNodes()) {
    for (const fill of fillers) place.append(...[fill(group)].filter(Boolean));
  }
  detail.hidden = !open;
  find(".expand", group).setAttribute("aria-expanded", String(open));
}

// Goes to the row that the address names, whatever filter hides it.
function reveal() {
  const group = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (group?.tagName !== "TBODY") return;
  if (group.hidden) find(`form[data-table="${group.closest("table").id}"]`)?.reset();
  group.hidden = false;
  setOpen(group, true);
  group.scrollIntoView({ block: "nearest", inline: "nearest" });
  find(".expand", group).focus();
}

// -- copying ----------------------------------------------------------------------------------------------------

// The old way, for pages that the browser gives no clipboard; leaves the text selected where that fails as well.
function copySelected(source) {
  const area = make("textarea", { readonly: "", "aria-hidden": "true" });
  area.value = source.textContent;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) getSelection().selectAllChildren(source);
  return done;
}

async function copy(button) {
  const source = document.getElementById(button.dataset.copy);
  let done = true;
  try {
    await navigator.clipboard.writeText(source.textContent);
  } catch {
    done = copySelected(source);
    button.focus();
  }
  const words = button.firstChild;
  words.data = done ? "Copied" : "Press Ctrl+C";
  say(done ? "Copied" : "The text is selected: press Control C to copy");
  setTimeout(() => (words.data = "Copy"), 2000);
}

document.addEventListener("click", (event) => {
  const target = event.target.closest("button, a");
  if (!target) return;
  if (target.matches(".sort")) sortBy(target.closest("th"));
  else if (target.matches(".expand")) {
    setOpen(target.closest("tbody"), target.getAttribute("aria-expanded") !== "true");
  } else if (target.matches(".copy")) copy(target);
  // A second click on the same link changes no address, and still means "go there".
  else if (target.hash && target.hash === location.hash) setTimeout(reveal);
});
addEventListener("hashchange", reveal);
setTimeout(reveal); // once every section has said how it fills its rows
