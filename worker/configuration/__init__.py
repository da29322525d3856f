"""Where settings come from: the environment, the key file, URLs of servers, the state directory."""
