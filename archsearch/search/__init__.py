"""The search: proposes candidates, runs them on workers, remembers every result. Never imports torch."""
