"""Golden files of everything that apps and operators rely on. A changed file means a changed public interface."""
