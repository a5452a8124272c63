"""A service that keeps one bundle loaded and answers over a Unix socket: one line of JSON in, lines of JSON out."""
