"""When things happen: schedule syntax, the scheduler over APScheduler, limits of concurrency, back-off."""
