// Polls the state of the search and shows new content; `charts`, `draw` and `first` are defined in the page.
const bar = document.getElementById("live"), content = document.getElementById("content");
const POLL_MS = 2000;
let shown = bar.dataset.version;

function say(text, state) {
  if (bar.textContent !== text) bar.textContent = text;
  bar.dataset.state = state;
}

async function get(path) {
  const answer = await fetch(path, { cache: "no-store" });
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

// Keeps opened details and scroll positions.
async function take(fresh) {
  const opened = [...content.querySelectorAll("details[open] > summary")].map(summary => summary.textContent);
  const sideways = [...content.querySelectorAll(".wide")].map(table => table.scrollLeft);
  const place = window.scrollY;
  // Without a height, the emptied page would be too short for its scroll position.
  content.style.minHeight = content.offsetHeight + "px";
  content.innerHTML = fresh.html;
  for (const summary of content.querySelectorAll("details > summary"))
    summary.parentElement.open = opened.includes(summary.textContent);
  content.querySelectorAll(".wide").forEach((table, index) => { table.scrollLeft = sideways[index] || 0; });
  charts = fresh.charts;
  await draw();
  window.scrollTo(0, place);
  content.style.minHeight = "";
  shown = fresh.version;
}

async function poll() {
  let ended = false;
  try {
    const state = await get("status");
    if (state.version !== shown) await take(await get("content"));
    ended = state.ended && state.version === shown;
    say(state.text, ended ? "ended" : "running");
  } catch (error) {
    say(error instanceof TypeError ? "`tuner report --live` does not answer; this page shows the last state"
      : error.message, "unreachable");
  }
  if (!ended) setTimeout(poll, POLL_MS);
}

first.then(poll);
