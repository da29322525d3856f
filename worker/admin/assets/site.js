// The checkbox in the header of a list selects all rows of the page.
for (const head of document.querySelectorAll("[data-chooses]")) {
  head.addEventListener("change", () => {
    for (const box of document.getElementsByName(head.dataset.chooses)) {
      box.checked = head.checked;
    }
  });
}

// Times are sent in UTC and shown in the time zone of the browser. UTC appears when the pointer is over them.
function showLocalTimes(part) {
  for (const time of part.querySelectorAll("time[datetime]")) {
    const moment = new Date(time.dateTime);
    if (!time.title && !Number.isNaN(moment.getTime())) {
      time.title = time.textContent;
      time.textContent = moment.toLocaleString("sv-SE");
    }
  }
}
showLocalTimes(document);

// The parts with data-refresh are loaded again every so many seconds while the page is visible.
const refreshed = [...document.querySelectorAll("[data-refresh]")];

async function refresh() {
  if (document.hidden || refreshed.some((part) => part.contains(document.activeElement))) {
    return;
  }
  try {
    const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const fresh = page.querySelectorAll("[data-refresh]");
    if (!answer.ok || fresh.length !== refreshed.length) {
      throw new Error(answer.statusText);
    }
    refreshed.forEach((part, place) => {
      part.replaceChildren(...fresh[place].childNodes);
      part.classList.remove("stale");
      showLocalTimes(part);
    });
  } catch {
    refreshed.forEach((part) => part.classList.add("stale"));
  }
}

if (refreshed.length) {
  setInterval(refresh, Number(refreshed[0].dataset.refresh) * 1000);
}
