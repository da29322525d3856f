"""What web apps call: tracking jobs, looking them up, acting on them, and the hooks for their frameworks."""
