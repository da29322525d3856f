"""All database queries. A function takes an open connection; the caller begins and commits the transaction."""
