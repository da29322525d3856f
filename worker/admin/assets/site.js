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

// A part with data-refresh is loaded again every so many seconds while the page is visible.
for (const part of document.querySelectorAll("[data-refresh]")) {
  setInterval(async () => {
    if (document.hidden || part.contains(document.activeElement)) {
      return;
    }
    try {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const fresh = page.querySelector("[data-refresh]");
      if (!answer.ok || !fresh) {
        throw new Error(answer.statusText);
      }
      part.replaceChildren(...fresh.childNodes);
      part.classList.remove("stale");
      showLocalTimes(part);
    } catch {
      part.classList.add("stale");
    }
  }, Number(part.dataset.refresh) * 1000);
}
