// The box at the head of a list chooses all of its page.
for (const head of document.querySelectorAll("[data-chooses]")) {
  head.addEventListener("change", () => {
    for (const box of document.getElementsByName(head.dataset.chooses)) {
      box.checked = head.checked;
    }
  });
}
