"""Knowledge about the hosted API: its families, their fetch URLs, and the meaning of its answers.

Everything here is pure. No other package contains knowledge about the vendor. The types of the replies are in
`worker.core.reply` and, for orders, in `worker.core.order_reply`.
"""
