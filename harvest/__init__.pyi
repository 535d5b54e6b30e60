from .models.pipelines import load_model as load_model
from .store.read import open_store as open_store
