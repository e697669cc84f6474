"""What each verb prints: results as lines and tables for a terminal."""
