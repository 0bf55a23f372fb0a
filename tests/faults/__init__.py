"""What machines do to programs: refuse, fail, fill up, interrupt and kill."""
