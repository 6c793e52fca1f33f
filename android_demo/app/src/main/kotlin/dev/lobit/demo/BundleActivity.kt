package dev.lobit.demo

import android.app.AlertDialog
import android.content.Context
import android.content.Intent
import android.os.Bundle
import android.view.View
import android.widget.Button
import android.widget.LinearLayout
import android.widget.TextView
import dev.lobit.core.Manifest

/** What a bundle is, before anything of it is loaded: model, recipe, sizes beside the free memory, and what runs where. */
class BundleActivity : Screen() {
    private val name: String get() = intent.getStringExtra(NAME).orEmpty()

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        setContentView(R.layout.bundle)
        title = name
        actionBar?.setDisplayHomeAsUpEnabled(true)
        findViewById<Button>(R.id.chat).setOnClickListener { ifItFits { startActivity(ChatActivity.intent(this, name)) } }
        findViewById<Button>(R.id.bench).setOnClickListener { ifItFits { startActivity(BenchActivity.intent(this, name)) } }
        findViewById<Button>(R.id.remove).setOnClickListener { askToRemove() }
    }

    override fun show(state: State) {
        val entry = state.entries.firstOrNull { it.name == name }
        findViewById<TextView>(R.id.problem).setTextOrHide(entry?.problem)
        val manifest = entry?.bundle?.manifest
        for (button in listOf(R.id.chat, R.id.bench)) findViewById<View>(button).isEnabled = manifest != null
        findViewById<LinearLayout>(R.id.facts).let { facts ->
            facts.removeAllViews()
            manifest?.let { showFacts(facts, it) }
        }
        val continues = manifest != null && manifest.tokens.chatTemplate == null
        findViewById<Button>(R.id.chat).setText(if (continues) R.string.continue_text else R.string.chat)
    }

    private fun showFacts(facts: LinearLayout, manifest: Manifest) {
        val model = manifest.model
        val there = manifest.delegation.delegated.values.sum()
        val elsewhere = manifest.delegation.left.values.sum()
        fact(facts, R.string.model, getString(R.string.model_value, model.family, count(model.parameters), model.layers))
        fact(facts, R.string.recipe, listOf(manifest.recipeName, manifest.recipeSummary).filter { it.isNotEmpty() }.joinToString(": "))
        fact(facts, R.string.file_size, getString(R.string.file_size_value, size(manifest.programBytes), size(app.probe.freeMemory)))
        fact(facts, R.string.context, getString(R.string.context_value, manifest.context, size(manifest.cache.bytes), manifest.cache.dtype))
        fact(facts, R.string.runs_on, getString(R.string.runs_on_value, manifest.delegation.backend, there, elsewhere))
        fact(facts, R.string.made_with, manifest.versions.entries.joinToString(", ") { "${it.key} ${it.value}" })
    }

    private fun fact(facts: LinearLayout, what: Int, value: String) {
        val view = layoutInflater.inflate(R.layout.fact, facts, false)
        view.findViewById<TextView>(R.id.what).setText(what)
        view.findViewById<TextView>(R.id.value).text = value
        facts.addView(view)
    }

    /** Goes on where the model fits into the free memory, or where the user wants to try all the same. */
    private fun ifItFits(go: () -> Unit) {
        val manifest = store.state.entries.firstOrNull { it.name == name }?.bundle?.manifest ?: return
        // The weights are mapped from the file, and XNNPACK packs them anew.
        val needed = 2 * manifest.programBytes + manifest.cache.bytes
        val free = app.probe.freeMemory
        if (needed <= free) return go()
        AlertDialog.Builder(this)
            .setMessage(getString(R.string.too_large, name, size(needed), size(free)))
            .setNegativeButton(R.string.cancel, null)
            .setPositiveButton(R.string.anyway) { _, _ -> go() }
            .show()
    }

    private fun askToRemove() {
        AlertDialog.Builder(this)
            .setMessage(getString(R.string.remove_question, name))
            .setNegativeButton(R.string.cancel, null)
            .setPositiveButton(R.string.remove) { _, _ ->
                store.remove(name)
                finish()
            }
            .show()
    }

    companion object {
        private const val NAME = "name"

        fun intent(context: Context, name: String): Intent = Intent(context, BundleActivity::class.java).putExtra(NAME, name)
    }
}
