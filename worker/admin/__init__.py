"""The page for operators: jobs, outputs, accounts and plots in a browser, behind a password. The extra `admin`."""
