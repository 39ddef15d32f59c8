"""A small store: orders, e-mails, invoices, a warehouse, and a total that is made again and again."""
