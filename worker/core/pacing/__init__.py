"""When to ask about a job next: how long jobs take, the policy, and its simulation. Pure."""
