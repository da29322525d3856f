"""When to poll a job next: learned durations, the policy, progress estimates and a simulation. Pure."""
