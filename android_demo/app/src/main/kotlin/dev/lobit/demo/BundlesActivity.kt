package dev.lobit.demo

import android.app.Activity
import android.content.ActivityNotFoundException
import android.content.Intent
import android.os.Bundle
import android.view.Menu
import android.view.MenuItem
import android.view.View
import android.widget.Button
import android.widget.ListView
import android.widget.TextView

/** The first screen: the bundles on this phone, and ways to bring another. */
class BundlesActivity : Screen() {
    private val rows by lazy { Rows(layoutInflater, R.layout.bundle_row, ::bind) }

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        setContentView(R.layout.bundles)
        title = getString(R.string.bundles)
        findViewById<ListView>(R.id.list).apply {
            adapter = rows
            setOnItemClickListener { _, _, index, _ -> startActivity(BundleActivity.intent(context, rows.items[index].name)) }
        }
        findViewById<Button>(R.id.open_zip).setOnClickListener {
            val types = arrayOf("application/zip", "application/octet-stream")
            val any = Intent(Intent.ACTION_OPEN_DOCUMENT).addCategory(Intent.CATEGORY_OPENABLE).setType("*/*")
            pick(any.putExtra(Intent.EXTRA_MIME_TYPES, types), ZIP)
        }
        findViewById<Button>(R.id.open_folder).setOnClickListener { pick(Intent(Intent.ACTION_OPEN_DOCUMENT_TREE), FOLDER) }
        if (state == null) store.refresh()
    }

    private fun pick(intent: Intent, request: Int) = try {
        startActivityForResult(intent, request)
    } catch (_: ActivityNotFoundException) {
        findViewById<TextView>(R.id.problem).setTextOrHide(getString(R.string.no_bundles))
    }

    override fun onActivityResult(request: Int, result: Int, data: Intent?) {
        super.onActivityResult(request, result, data)
        val uri = data?.data ?: return
        if (result != Activity.RESULT_OK) return
        store.dismissProblem()
        if (request == ZIP) store.takeZip(contentResolver, uri) else store.takeFolder(contentResolver, uri)
    }

    override fun show(state: State) {
        showWork(state)
        rows.items = state.entries
        findViewById<View>(R.id.empty).visibility = if (state.entries.isEmpty() && state.work == null) View.VISIBLE else View.GONE
    }

    override fun onCreateOptionsMenu(menu: Menu): Boolean {
        menu.add(R.string.licences)
        return true
    }

    override fun onOptionsItemSelected(item: MenuItem): Boolean {
        startActivity(Intent(this, LicencesActivity::class.java))
        return true
    }

    private fun bind(view: View, entry: Entry) {
        view.findViewById<TextView>(R.id.name).text = entry.name
        view.findViewById<TextView>(R.id.what).text = entry.bundle?.let { summary(it) } ?: entry.problem
    }

    private fun summary(bundle: dev.lobit.core.Bundle): String {
        val manifest = bundle.manifest
        return "${manifest.model.family}, ${count(manifest.model.parameters)}, ${manifest.recipeName}, ${size(manifest.programBytes)}"
    }

    companion object {
        const val ZIP = 1
        const val FOLDER = 2
    }
}
