"""`trimsfs spawn`: programs in forks, with real processes; each test has a directory of fork servers of its own."""
