"""S-IB in other libraries' training loops; each module is imported only where it is asked for."""
