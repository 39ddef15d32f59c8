"""A small store: orders, e-mails, invoices, deliveries, and what has come in."""
