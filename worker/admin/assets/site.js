// The checkbox in the header of a list selects all rows of the page.
for (const head of document.querySelectorAll("[data-chooses]")) {
  head.addEventListener("change", () => {
    for (const box of document.getElementsByName(head.dataset.chooses)) {
      box.checked = head.checked;
    }
  });
}
